"""Compiles the networks of ``benchmarks.gpu`` in parallel: ``python -m benchmarks.precompile``.

Inductor caches on disk what it has compiled. Here a separate process compiles each network, mode and arm, on all cores;
``benchmarks.gpu --parts compiled``, a single process, finds them there and spends its time on measuring.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch._inductor.config

from benchmarks.arms import DIA, PLAIN, SE_PER_BLOCK, SE_SHARED
from benchmarks.gpu import MODES, workloads
from benchmarks.running import Run, Setting

#: Most important first.
ARMS = (DIA, PLAIN, SE_PER_BLOCK, SE_SHARED)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile as much as the minutes allow."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precompile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=4, help="4 by default")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="by default one per core")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU. Use --tiny for a dry run on the CPU.")
    if options.only is not None:  # the process of one job
        _compile(*options.only, tiny=options.tiny)
        return
    modes = MODES[:1] if options.tiny else MODES
    titles = [workload.title for workload in workloads(tiny=options.tiny)]
    jobs = [(title, mode, arm) for arm in ARMS for title in titles for mode in modes]
    end = time.monotonic() + 60 * options.minutes
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(lambda job: _in_a_process(job, end, tiny=options.tiny), jobs))
    _forget_choices()


def _in_a_process(job: tuple[str, ...], end: float, *, tiny: bool) -> None:
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.precompile", *(["--tiny"] if tiny else []), "--only", *job]
    try:
        done = subprocess.run(command, timeout=max(0, end - start), check=False).returncode == 0
        result = f"{time.monotonic() - start:.0f} seconds" if done else "ended with an error"
    except subprocess.TimeoutExpired:
        result = "not compiled in time"
    print(f"precompile: {', '.join(job)}: {result}", flush=True)


def _compile(title: str, mode: str, arm: str, *, tiny: bool) -> None:
    torch._inductor.config.compile_threads = 1  # the other processes have the other cores
    torch.backends.cudnn.benchmark = True  # as in the measurement
    [workload] = [workload for workload in workloads(tiny=tiny) if workload.title == title]
    [chosen] = [known for known in MODES if known == mode]
    setting = Setting(torch.device("cpu" if tiny else "cuda"), chosen, bf16=True, channels_last=True)
    run = Run(workload.families[0].arms[arm], workload, setting)
    run.prepared("training")()
    run.prepared("inference")()


def _forget_choices() -> None:
    """Remove the kernels' tilings, tuned while other processes used the GPU, so that they are tuned again."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for choice in Path(cache_dir()).rglob("*.best_config"):
        choice.unlink()


if __name__ == "__main__":
    main()
