"""Measures on a GPU within a given number of minutes: ``python -m benchmarks.gpu --help``."""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.arms import DIA, SE_PER_BLOCK, SE_SHARED, WORKLOADS, Workload
from benchmarks.measures import Measure, common_values, kernels, memory, rows, times
from benchmarks.records import Results, Row, note_stop, results_folder
from benchmarks.running import Mode, Setting

#: Largest share of the time for each part; what a part does not use goes to the later ones.
SHARES = {"eager": 0.15, "evidence": 0.55, "compiled": 0.3}
#: Networks, most important first and slowest last, and images per step.
BATCHES = {"resnet50": 64, "vit_s": 64, "resnet164": 128}
#: Modes of compilation.
MODES: tuple[Mode, ...] = ("compile", "reduce-overhead")
#: Seconds that a process needs at most to import everything and reach the GPU.
START = 15


def main(argv: Sequence[str] | None = None) -> None:
    """Run each part in its own process, which is stopped when its time is up."""
    options = _parser().parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU. Use --tiny for a dry run on the CPU.")
    if options.minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes}.")
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}.")
    if options.data is not None and not options.data.is_file():
        raise ValueError(f"--data {options.data} is not there. python -m benchmarks.pack_cifar writes it.")
    if options.seconds is not None:  # the process of one part
        [part] = options.parts
        _run(part, options)
        return
    end, failed = time.monotonic() + 60 * options.minutes, []
    for number, part in enumerate(options.parts):
        later = sum(SHARES[name] for name in options.parts[number + 1 :])
        seconds = (end - time.monotonic()) * SHARES[part] / (SHARES[part] + later)
        if not _finished(part, seconds, options):
            failed.append(part)
    if failed:
        raise SystemExit(f"These parts failed: {', '.join(failed)}. Their results so far are kept.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures on a GPU.")
    parser.add_argument("--data", type=Path, help="CIFAR-100, packed by benchmarks.pack_cifar; without it, no evidence")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="by default all")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all parts together, 7.5 by default")
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each arm, 20 by default")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per arm, 3 by default")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU; its results mean nothing")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def _finished(part: str, seconds: float, options: argparse.Namespace) -> bool:
    """Run a part for a limited time, and return whether it ended without an error."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--parts", part, "--seconds", str(int(seconds))]
    command += ["--minutes", str(options.minutes), "--runs", str(options.runs), "--seeds", str(options.seeds)]
    command += ["--data", str(options.data)] if options.data is not None else []
    command += ["--tiny"] if options.tiny else []
    _path(part, tiny=options.tiny).unlink(missing_ok=True)  # so that an older file is not mistaken for this one
    try:
        return subprocess.run(command, timeout=seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        note_stop(_path(part, tiny=options.tiny), f"stopped after {seconds:.0f} seconds")
        print(f"{part}: stopped after {seconds:.0f} seconds; what was measured is kept", flush=True)
        return True


def _path(part: str, *, tiny: bool) -> Path:
    return results_folder(tiny=tiny) / f"gpu_{part}.json"


def _run(part: str, options: argparse.Namespace) -> None:
    torch.backends.cudnn.benchmark = True
    device = torch.device("cpu" if options.tiny else "cuda")
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "eager": lambda: _eager(device, options),
        "compiled": lambda: _compiled(device, options),
        "evidence": lambda: _evidence(device, options),
    }
    results = Results(_path(part, tiny=options.tiny), "evidence" if part == "evidence" else "gpu")
    for row in parts[part]():
        results.add(row)


def workloads(*, tiny: bool) -> list[Workload]:
    """Return the networks of this package's family alone, with the batches of a GPU."""
    named = [WORKLOADS["tiny"]] if tiny else [replace(WORKLOADS[name], batch=size) for name, size in BATCHES.items()]
    return [replace(workload, families=workload.families[:1]) for workload in named]


def _eager(device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    measures: list[Measure] = [times(2 if options.tiny else options.runs), memory, kernels]
    for workload in workloads(tiny=options.tiny):
        yield from _rows(workload, Setting(device, "eager", bf16=True, channels_last=True), measures, None)


def _compiled(device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    timed = times(2 if options.tiny else options.runs)
    modes = MODES[:1] if options.tiny else MODES
    arms = [] if options.tiny else [DIA, SE_PER_BLOCK, SE_SHARED]
    for workload, mode in product(workloads(tiny=options.tiny), modes):
        torch._dynamo.reset()
        measures: list[Measure] = [timed] if options.tiny else [timed, memory, kernels]
        yield from _rows(workload, Setting(device, mode, bf16=True, channels_last=True), measures, arms)


def _rows(
    workload: Workload, setting: Setting, measures: Sequence[Measure], only: Sequence[str] | None
) -> Iterator[Row]:
    """Yield rows, or the error, so that GPU time is not lost for the networks that follow."""
    try:
        yield from rows(workload, setting, measures, only)
    except Exception as error:
        traceback.print_exc()
        message = str(error).strip().partition("\n")[0]
        family = common_values(workload, setting, workload.families[0])
        yield {**family, "arm": "the others", "left_out": f"{type(error).__name__}: {message}"}


def _evidence(device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    from benchmarks.evidence import Plan, evidence_rows, load, noise  # needs matplotlib; the other parts do not

    if options.data is None and not options.tiny:
        yield {"left_out": "no --data"}
        return
    data = noise(device) if options.data is None else load(options.data, device)
    if options.tiny:
        plan = Plan(depth=20, batch=16, seeds=2, seconds=1000, most_epochs=2, mapped=16)
    else:
        plan = Plan(depth=164, batch=128, seeds=options.seeds, seconds=options.seconds - START, most_epochs=60)
    yield from evidence_rows(data, plan)


if __name__ == "__main__":
    main()
