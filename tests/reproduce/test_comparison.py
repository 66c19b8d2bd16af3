"""The table of `reproduce`, against scipy's tests."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dia_lightning.reproduce.comparison import Estimate, compare, estimate
from dia_lightning.reproduce.experiment import Experiment, Metric, Run
from dia_lightning.reproduce.plot import draw_comparison
from dia_lightning.reproduce.results import Result
from dia_lightning.reproduce.table import markdown_table, write_comparison

ACCURACY = Metric("test/acc", scale=100, unit="%", digits=2)
CONTROL = [0.701, 0.694, 0.712, 0.688]
TREATED = [0.715, 0.699, 0.731, 0.690]


def experiment(**controls: str) -> Experiment:
    arms: dict[str, tuple[str, ...]] = {"plain": (), "shared": (), "alone": ()}
    return Experiment("example", ("a.yaml",), {"a.yaml": "x"}, arms, (0, 1, 2, 3), controls, (ACCURACY,))


def results(**arms: list[float | str | None]) -> dict[Run, Result]:
    """Values by seed; a text is another outcome, `None` a seed that has not run."""
    made = {}
    for arm, values in arms.items():
        for seed, value in enumerate(values):
            if value is None:
                continue
            outcome: Any = value if isinstance(value, str) else "finished"
            metrics = {} if isinstance(value, str) else {"test/acc": value}
            made[Run(arm, seed, ("a.yaml",), ())] = Result(outcome, metrics, 60.0, [], {}, {})
    return made


def test_means_and_intervals_are_scipys() -> None:
    _, row, _ = compare(experiment(shared="plain"), results(plain=[*CONTROL], shared=[*TREATED]), ACCURACY)
    assert row.estimate is not None
    assert row.difference is not None
    values, control = 100 * np.array(TREATED), 100 * np.array(CONTROL)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    paired = stats.ttest_rel(values, control).confidence_interval(0.95)
    assert row.estimate == pytest.approx((4, values.mean(), values.std(ddof=1), interval.low, interval.high))
    deviation = (values - control).std(ddof=1)
    assert row.difference == pytest.approx((4, (values - control).mean(), deviation, paired.low, paired.high))


def test_differences_are_over_the_seeds_that_both_arms_have() -> None:
    ends = results(plain=[0.1, "diverged", 0.3, 0.4], shared=[0.5, 0.6, None, 0.9])
    _, row, _ = compare(experiment(shared="plain"), ends, ACCURACY)
    assert row.estimate is not None
    assert row.difference is not None
    assert row.estimate[:2] == pytest.approx((3, 200 / 3))
    assert row.difference[:2] == pytest.approx((2, 45.0))


def test_arms_may_have_controls_of_their_own() -> None:
    ends = results(plain=[0.1], shared=[0.2], alone=[0.5])
    rows = compare(experiment(shared="plain", alone="shared"), ends, ACCURACY)
    assert [row.difference and pytest.approx(row.difference.mean) for row in rows] == [None, 10.0, 30.0]


def test_one_seed_has_no_deviation_and_no_interval() -> None:
    assert estimate([0.5]) == Estimate(1, 0.5, None, None, None)
    table = markdown_table(
        ACCURACY, compare(experiment(shared="plain"), results(plain=[0.5], shared=[0.625]), ACCURACY)
    )
    assert "| plain | 1 (3 of 4 not run yet) | 50.00 | - | - | - | - |" in table
    assert "| shared | 1 (3 of 4 not run yet) | 62.50 | - | plain | +12.50 (1 pair) | - |" in table


def test_every_seed_without_a_value_is_accounted_for() -> None:
    ends = results(plain=["diverged", "failed", None, math.nan], shared=[0.5, math.inf, 0.25, 0.75])
    plain, shared, alone = compare(experiment(), ends, ACCURACY)
    assert plain.missing == "2 of 4 diverged, 1 of 4 failed, 1 of 4 not run yet"
    assert shared.missing == "1 of 4 diverged"
    assert alone.missing == "4 of 4 not run yet"
    assert shared.estimate is not None
    assert shared.estimate.mean == pytest.approx(50.0)


def test_files_hold_the_same_numbers(tmp_path: Path) -> None:
    write_comparison(experiment(shared="plain"), results(plain=[*CONTROL], shared=[*TREATED]), tmp_path)
    with open(tmp_path / "table.csv", newline="") as file:
        _, row, _ = csv.DictReader(file)
    assert [float(value) for value in row["values"].split()] == pytest.approx([100 * value for value in TREATED])
    assert row["seeds"] == "0 1 2 3"
    text = (tmp_path / "table.md").read_text()
    spread = f"{100 * np.mean(TREATED):.2f} ± {100 * np.std(TREATED, ddof=1):.2f}"
    numbers = [float(row[name]) for name in ("low", "high", "difference", "difference_low", "difference_high")]
    low, high, difference, least, most = numbers
    assert (
        f"| shared | 4 | {spread} | {low:.2f} to {high:.2f} | plain | {difference:+.2f} | {least:+.2f} to {most:+.2f} |"
        in text
    )
    assert "for seed in 0 1 2 3; do\n  dia-lightning fit -c a.yaml --seed_everything=$seed\n" in text
    assert "shared 71.50 (0), 69.90 (1), 73.10 (2), 69.00 (3)" in text


def test_the_picture_shows_every_seed_the_interval_and_the_unit() -> None:
    rows = compare(experiment(shared="plain"), results(plain=[*CONTROL], shared=[0.7, "diverged"]), ACCURACY)
    [ax] = draw_comparison("example", {ACCURACY: rows}).axes
    assert ax.get_xlabel() == "test/acc (%)"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["plain", "shared", "alone"]
    [points, one, *_] = [line for line in ax.lines if line.get_marker() == "o"]
    assert np.asarray(points.get_xdata()) == pytest.approx(100 * np.array(CONTROL))
    assert np.asarray(one.get_xdata()) == pytest.approx([70.0])
    [bar] = [container for container in ax.containers if len(container[2])]
    [segment] = bar[2][0].get_segments()
    assert rows[0].estimate is not None
    assert list(segment[:, 0]) == pytest.approx([rows[0].estimate.low, rows[0].estimate.high])
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["1 of 4 diverged, 2 of 4 not run yet", "4 of 4 not run yet"]
