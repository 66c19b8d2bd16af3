"""Means over seeds, their intervals, and paired differences between arms."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dia_lightning.reproduce.experiment import Experiment, Metric, Run
from dia_lightning.reproduce.results import Result

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean of n values; deviation (n - 1) and the interval for the mean (Student's t) are unknown for n = 1."""

    n: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """What is known about one metric of one arm.

    Args:
        arm: its name.
        values: by seed, in the metric's unit; of runs that have ended with a finite value.
        estimate: of the values; ``None`` without any.
        control: the arm that it is compared with, if any.
        difference: of this arm's values minus those of the control, over the seeds that both have.
        diverged: number of seeds that diverged.
        failed: number of seeds that ended by another error.
        seeds: number of seeds of the experiment.
    """

    arm: str
    values: Mapping[int, float]
    estimate: Estimate | None
    control: str | None
    difference: Estimate | None
    diverged: int
    failed: int
    seeds: int

    @property
    def missing(self) -> str:
        """A note on seeds without a value; empty if there are none."""
        open_ = self.seeds - len(self.values) - self.diverged - self.failed
        counts = {"diverged": self.diverged, "failed": self.failed, "not run yet": open_}
        return ", ".join(f"{count} of {self.seeds} {what}" for what, count in counts.items() if count)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of values with its 95 % t-interval; ``None`` without values.

    Example:
        >>> estimate([1.0, 2.0, 3.0])
        Estimate(n=3, mean=2.0, deviation=1.0, low=-0.484..., high=4.484...)
    """
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean, None, None, None)
    from scipy.stats import t  # takes a second to import

    deviation = statistics.stdev(values)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(n, mean, deviation, mean - half, mean + half)


def compare(experiment: Experiment, results: Mapping[Run, Result], metric: Metric) -> list[Row]:
    """Return a row per arm.

    A run that ended with a value of the metric that is not finite counts as diverged.
    """
    endings: dict[str, dict[int, str]] = {arm: {} for arm in experiment.arms}
    values: dict[str, dict[int, float]] = {arm: {} for arm in experiment.arms}
    for run, result in results.items():
        value = result.metrics.get(metric.name, math.nan) * metric.scale
        if result.outcome == "finished" and math.isfinite(value):
            values[run.arm][run.seed] = value
        else:
            endings[run.arm][run.seed] = "failed" if result.outcome == "failed" else "diverged"
    rows = []
    for arm in experiment.arms:
        control = experiment.controls.get(arm)
        reference = {} if control is None else values[control]
        common = [seed for seed in values[arm] if seed in reference]
        rows.append(
            Row(
                arm=arm,
                values=values[arm],
                estimate=estimate(list(values[arm].values())),
                control=control,
                difference=estimate([values[arm][seed] - reference[seed] for seed in common]),
                diverged=list(endings[arm].values()).count("diverged"),
                failed=list(endings[arm].values()).count("failed"),
                seeds=len(experiment.seeds),
            )
        )
    return rows
