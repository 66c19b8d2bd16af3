"""Rows of a workload: time, memory and kernels of every arm."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain

from benchmarks.arms import PLAIN, Build, Family, Workload
from benchmarks.kernels import count_kernels
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.records import Row
from benchmarks.running import Phase, Run, Setting
from benchmarks.timing import clock, interleaved

PHASES: tuple[Phase, ...] = ("training", "inference")
#: Measures an arm, given the plain network and the arm's.
Measure = Callable[[Run, Run], Iterator[Row]]


def rows(
    workload: Workload, setting: Setting, measures: Sequence[Measure], only: Sequence[str] | None = None
) -> Iterator[Row]:
    """Yield the measurements of every arm, or why it cannot be measured.

    Args:
        workload: the networks.
        setting: how to run them.
        measures: what to measure, one arm after another.
        only: names of the arms besides plain, in the order of measurement; by default all.
    """
    for family in workload.families:
        common = common_values(workload, setting, family)
        if family.left_out:
            yield {**common, "left_out": family.left_out}
            continue
        plain: Run | None = None
        for arm, build in _chosen(family, only).items():
            run = Run(build, workload, setting)
            plain = plain or run
            parameters = sum(parameter.numel() for parameter in run.network.parameters())
            for measure in measures:
                for row in measure(plain, run):
                    yield {**common, "arm": arm, "parameters": parameters, **row}


def common_values(workload: Workload, setting: Setting, family: Family) -> Row:
    """Return what all rows of a family share."""
    sizes: Row = {"workload": workload.title, "batch": workload.batch, "sites": workload.sites}
    return {**sizes, "setting": setting.label, "mode": setting.mode, "made_by": family.made_by}


def _chosen(family: Family, only: Sequence[str] | None) -> dict[str, Build]:
    names = family.arms if only is None else [PLAIN, *(arm for arm in only if arm in family.arms)]
    return {name: family.arms[name] for name in names}


def times(rounds: int) -> Measure:
    """Measure time in both phases."""

    def measure(plain: Run, run: Run) -> Iterator[Row]:
        for phase in PHASES:
            timing = interleaved(plain.prepared(phase), run.prepared(phase), clock(run.setting.device), rounds)
            yield {"phase": phase, "images_per_second": len(run.images) / timing.seconds, **asdict(timing)}

    return measure


def memory(plain: Run, run: Run) -> Iterator[Row]:
    """Measure what a training step keeps for backward (not compiled) and, on a GPU, its peak.

    CUDA graphs keep their memory in separate pools, whose peak cannot be read.
    """
    run.prepared("training")()  # a library may allocate a workspace on the first run
    if run.setting.mode == "eager":
        yield {"saved_bytes": saved_bytes(run.loss, chain(run.network.parameters(), run.network.buffers()))}
    if run.setting.device.type == "cuda" and run.setting.mode != "reduce-overhead":
        yield {"peak_bytes": peak_bytes(run.step, run.setting.device)}


def kernels(plain: Run, run: Run) -> Iterator[Row]:
    """Count kernels of a training step."""
    run.prepared("training")()
    losses = []
    forward = count_kernels(lambda: losses.append(run.loss()), run.setting.device)
    backward = count_kernels(losses[0].backward, run.setting.device)
    run.network.zero_grad(set_to_none=True)
    yield {"forward": forward, "backward": backward}
