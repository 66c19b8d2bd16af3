"""How cost grows with depth, width, batch and resolution."""

from collections.abc import Iterator
from dataclasses import asdict

from benchmarks.arms import PLAIN, Workload, attached, cifar_resnet
from benchmarks.records import Row
from benchmarks.running import Run, Setting
from benchmarks.timing import clock, interleaved

#: What is varied, one at a time; the others keep their value in BASE.
AXES: dict[str, tuple[int, ...]] = {
    "depth": (20, 56, 110, 164),
    "width": (1, 2, 4),
    "batch": (2, 8, 32),
    "resolution": (16, 32, 64),
}
TINY_AXES: dict[str, tuple[int, ...]] = {"depth": (20, 29), "width": (1, 2), "batch": (1, 2), "resolution": (8, 16)}
BASE = {"depth": 20, "width": 1, "batch": 8, "resolution": 32}
TINY_BASE = {**BASE, "batch": 2, "resolution": 8}


def growth_rows(setting: Setting, rounds: int, *, tiny: bool) -> Iterator[Row]:
    """Yield the time of a training step of every arm of this package, at every value of every axis."""
    for axis, values in (TINY_AXES if tiny else AXES).items():
        for value in values:
            sizes = {**(TINY_BASE if tiny else BASE), axis: value}
            arms = attached(cifar_resnet(depth=sizes["depth"], widen_factor=sizes["width"]))
            workload = Workload("CIFAR ResNet", sizes["batch"], sizes["resolution"], 100, (sizes["depth"] - 2) // 3, ())
            plain = Run(arms.pop(PLAIN), workload, setting)
            for arm, build in arms.items():
                run = Run(build, workload, setting)
                timing = interleaved(
                    plain.prepared("training"), run.prepared("training"), clock(setting.device), rounds
                )
                place: Row = {"setting": setting.label, "mode": setting.mode, "axis": axis, "value": value, **sizes}
                yield {**place, "arm": arm, "sites": workload.sites, **asdict(timing)}
