"""Time relative to the plain network."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 3  # CUDA graphs are recorded in the second run


@dataclass(frozen=True)
class Timing:
    """How long a run takes.

    Args:
        seconds: the median.
        ratio: to the plain network, the median; ``low`` and ``high`` are its quartiles.
        low: see ``ratio``.
        high: see ``ratio``.
        extra: median of the seconds beyond the plain network's.
        rounds: number of runs.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    extra: float
    rounds: int


def interleaved(
    plain: Callable[[], None], run: Callable[[], None], seconds: Callable[[Callable[[], None]], float], rounds: int
) -> Timing:
    """Time a run between two runs of the plain network, so that drift in the machine's speed favours neither.

    Args:
        plain: the baseline; pass ``run`` itself to see how precise the machine is.
        run: what to time.
        seconds: the clock, see :func:`clock`.
        rounds: how often.

    Raises:
        ValueError: if there are fewer than 2 rounds.
    """
    if rounds < 2:
        raise ValueError(f"--runs must be at least 2 for quartiles, got {rounds}.")
    for _ in range(WARM_UP):
        plain()
        run()
    times, plains = [], []
    gc.collect()
    gc.disable()  # its pauses would hit one or the other
    try:
        before = seconds(plain)
        for _ in range(rounds):
            times.append(seconds(run))
            after = seconds(plain)
            plains.append((before + after) / 2)
            before = after
    finally:
        gc.enable()
    pairs = list(zip(times, plains, strict=True))
    low, ratio, high = statistics.quantiles([own / other for own, other in pairs], n=4, method="inclusive")
    extra = statistics.median(own - other for own, other in pairs)
    return Timing(statistics.median(times), ratio, low, high, extra, rounds)


def clock(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Return a clock: CUDA events on a GPU, else the CPU time of this process."""
    return _on_gpu if device.type == "cuda" else _on_cpu


def _on_cpu(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _on_gpu(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
