"""Measures what attention costs: ``python -m benchmarks.cost --help``."""

import argparse
import re
from collections.abc import Iterator, Sequence

import torch

from benchmarks.arms import WORKLOADS
from benchmarks.growth import growth_rows
from benchmarks.kernels import count_graphs
from benchmarks.measures import Measure, kernels, memory, rows, times
from benchmarks.records import Results, Row, results_folder
from benchmarks.running import Setting

PARTS = ("time", "memory", "kernels", "graphs", "growth")
#: What can be measured on compiled networks; kept tensors and operations are only visible where Python runs.
COMPILED = ("time", "growth")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write one file per part and workload."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch sees no GPU here. Leave --device out for the CPU.")
    parts = options.only or (["time"] if options.compile else PARTS)
    if options.compile and (not_seen := [part for part in parts if part not in COMPILED]):
        raise ValueError(f"--compile measures {' and '.join(COMPILED)}, not {not_seen[0]}. Leave one of both out.")
    torch.set_num_threads(1)
    setting = Setting(device, "compile" if options.compile else "eager", options.bf16, options.channels_last)
    rounds = 2 if options.tiny else options.runs
    names = options.workloads or _default_workloads(tiny=options.tiny, compiled=options.compile)
    measures: dict[str, Measure] = {"time": times(rounds), "memory": memory, "kernels": kernels}
    for part in parts:
        if part in measures:
            for name in names:
                _write(part, name, setting, rows(WORKLOADS[name], setting, [measures[part]]), tiny=options.tiny)
        elif part == "growth":
            _write(part, "", setting, growth_rows(setting, rounds, tiny=options.tiny), tiny=options.tiny)
        else:
            _write(part, "", setting, _graph_rows((3,) if options.tiny else (3, 6, 12, 24)), tiny=options.tiny)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description="Measures what attention costs.")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts, by default all; with --compile, time")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="networks, by default resnet164 and resnet50")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each arm, 15 by default")
    parser.add_argument("--compile", action="store_true", help="compare compiled with compiled; resnet20 by default")
    parser.add_argument("--device", default="cpu", help="cpu, the default, or cuda")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--channels_last", action="store_true", help="weights and images in channels-last format")
    parser.add_argument("--tiny", action="store_true", help="a dry run of seconds; its results mean nothing")
    return parser


def _default_workloads(*, tiny: bool, compiled: bool) -> list[str]:
    if tiny:
        return ["tiny"]
    return ["resnet20"] if compiled else ["resnet164", "resnet50"]


def _write(part: str, workload: str, setting: Setting, made: Iterator[Row], *, tiny: bool) -> None:
    words = f"{part} {workload} {setting.label} {setting.mode}".split()
    name = re.sub(r"\W+", "_", "-".join(words))
    results = Results(results_folder(tiny=tiny) / f"{name}.json", part)
    for row in made:
        results.add(row)


def _graph_rows(numbers: Sequence[int]) -> Iterator[Row]:
    for blocks in numbers:
        for arm, graphs in count_graphs(blocks).items():
            yield {"blocks": blocks, "arm": arm, "graphs": graphs}


if __name__ == "__main__":
    main()
