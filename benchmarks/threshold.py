"""Finds the feature size from which the recalibration functions pay off: ``python -m benchmarks.threshold``."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from unittest.mock import patch

import torch

import dia_lightning.attention._recalibration as recalibration
from benchmarks.arms import DIA, PLAIN, SE_PER_BLOCK, WORKLOADS, Workload
from benchmarks.memory import peak_bytes
from benchmarks.records import Results, Row, results_folder
from benchmarks.running import Run, Setting
from benchmarks.timing import clock, interleaved

#: Images per step: where kernel launches are the bottleneck, and where the GPU is.
BATCHES = {"resnet50": (64, 384), "resnet164": (128, 512, 2048)}
#: Sizes from which the functions are used: the CPU's, and never.
FUNCTIONS, PLAIN_WAY = 2**18, 2**62


def main(argv: Sequence[str] | None = None) -> None:
    """Time both ways, in training."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threshold", description=__doc__)
    parser.add_argument("--runs", type=int, default=6, help="timed runs of each, 6 by default")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU; its results mean nothing")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU. Use --tiny for a dry run on the CPU.")
    torch.backends.cudnn.benchmark = True
    device = torch.device("cpu" if options.tiny else "cuda")
    results = Results(results_folder(tiny=options.tiny) / "threshold.json", "threshold")
    batches = {"tiny": (2,)} if options.tiny else BATCHES
    for name, sizes in batches.items():
        for batch in sizes:
            for row in _rows(replace(WORKLOADS[name], batch=batch), device, options.runs):
                results.add(row)


def _rows(workload: Workload, device: torch.device, runs: int) -> Iterator[Row]:
    arms = workload.families[0].arms
    setting = Setting(device, bf16=True, channels_last=True)
    plain = Run(arms[PLAIN], workload, setting)
    for arm in (SE_PER_BLOCK, DIA):
        run = Run(arms[arm], workload, setting)
        for way, small in (("functions", FUNCTIONS), ("plain way", PLAIN_WAY)):
            row: Row = {"workload": workload.title, "batch": workload.batch, "arm": arm, "way": way}
            with patch.multiple(recalibration, SMALL=small, SMALL_ON_CPU=small):
                row |= asdict(interleaved(plain.prepared("training"), run.prepared("training"), clock(device), runs))
                row |= {"peak_bytes": peak_bytes(run.step, device)} if device.type == "cuda" else {}
            yield row


if __name__ == "__main__":
    main()
