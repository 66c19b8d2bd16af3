"""The table of a comparison: Markdown to read, CSV to compute with, a figure."""

import csv
from collections.abc import Mapping
from pathlib import Path

from dia_lightning._whole_files import written_whole
from dia_lightning.reproduce.comparison import Estimate, Row, compare
from dia_lightning.reproduce.experiment import Experiment, Metric, Run, in_shell
from dia_lightning.reproduce.plot import draw_comparison
from dia_lightning.reproduce.results import Result

HEADER = ("arm", "n", "mean ± deviation", "95 % interval", "compared with", "difference", "95 % interval")
COLUMNS = (
    *("metric", "unit", "arm", "n", "diverged", "failed", "mean", "deviation", "low", "high"),
    *("control", "pairs", "difference", "difference_deviation", "difference_low", "difference_high"),
    *("seeds", "values"),
)
NOTE = """\
Deviations are those of single runs (n - 1). Intervals are 95 % t-intervals of means over seeds; differences are paired
by seed. Seeds that diverged or failed have no value and are left out of all of these, which favours arms that lose
their worst seeds. No interval is widened for the number of comparisons: among twenty without any effect, one is
expected to leave out 0.
"""


def write_comparison(experiment: Experiment, results: Mapping[Run, Result], folder: Path) -> Path:
    """Write ``table.md``, ``table.csv`` and ``table.png``.

    Args:
        experiment: what was compared.
        results: of the runs that have ended.
        folder: where to.

    Returns:
        The path of ``table.md``.
    """
    rows = {metric: compare(experiment, results, metric) for metric in experiment.metrics}
    path = folder / "table.md"
    with written_whole(path) as part:
        part.write_text(_markdown(experiment, rows, results), encoding="utf-8")
    with written_whole(folder / "table.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_csv_row(metric, row) for metric, of_metric in rows.items() for row in of_metric)
    with written_whole(folder / "table.png") as part:
        draw_comparison(experiment.name, rows).savefig(part, format="png")
    return path


def markdown_table(metric: Metric, rows: list[Row]) -> str:
    """Return the table of one metric, with the values of every seed below it."""
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(row, metric) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    values = "; ".join(
        f"{row.arm} {', '.join(f'{value:.{metric.digits}f} ({seed})' for seed, value in row.values.items())}"
        for row in rows
        if row.values
    )
    return f"{table}\n\nValues (seed): {values or 'none yet'}.\n"


def _markdown(experiment: Experiment, rows: Mapping[Metric, list[Row]], results: Mapping[Run, Result]) -> str:
    parts = [f"# {experiment.name}\n"]
    for metric, of_metric in rows.items():
        parts += [f"## {metric.title}\n", markdown_table(metric, of_metric)]
    seeds = " ".join(map(str, experiment.seeds))
    commands = [_with_any_seed(run) for run in experiment.runs if run.seed == experiment.seeds[0]]
    loop = "\n".join([f"for seed in {seeds}; do", *(f"  {command}" for command in commands), "done"])
    parts += [
        NOTE,
        "![values of all seeds](table.png)\n",
        "## Commands\n",
        f"In the order of the arms; each run had a folder of its own besides.\n\n```sh\n{loop}\n```\n",
        _circumstances(results),
    ]
    return "\n".join(parts)


def _with_any_seed(run: Run) -> str:
    *command, _ = run.command
    return f"{in_shell(command)} --seed_everything=$seed"


def _circumstances(results: Mapping[Run, Result]) -> str:
    """State how long the runs took, and with which versions and environment."""
    if not results:
        return "No run has ended yet.\n"
    versions = {_listing(result.versions) for result in results.values()}
    environments = {_listing(result.environment, "=") for result in results.values()}
    seconds = [result.seconds for result in results.values() if result.outcome == "finished"]
    times = f", {min(seconds):.0f} to {max(seconds):.0f} s per finished run" if seconds else ""
    return f"{len(results)} runs{times}; {' and '.join(sorted(versions))}; {' and '.join(sorted(environments))}.\n"


def _listing(values: Mapping[str, str], between: str = " ") -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def _cells(row: Row, metric: Metric) -> tuple[str, ...]:
    count = f"{len(row.values)}" + (f" ({row.missing})" if row.missing else "")
    shown, difference = row.estimate, row.difference
    mean = "-" if shown is None else f"{shown.mean:.{metric.digits}f}"
    if shown is not None and shown.deviation is not None:
        mean += f" ± {shown.deviation:.{metric.digits}f}"
    change = "-" if difference is None else _number(difference.mean, metric.digits, "+")
    if difference is not None and difference.n < row.seeds:
        change += f" ({difference.n} pair{'s' * (difference.n > 1)})"
    intervals = _interval(shown, metric.digits), _interval(difference, metric.digits, "+")
    return row.arm, count, mean, intervals[0], row.control or "-", change, intervals[1]


def _interval(shown: Estimate | None, digits: int, sign: str = "") -> str:
    if shown is None or shown.low is None:
        return "-"
    assert shown.high is not None
    return f"{_number(shown.low, digits, sign)} to {_number(shown.high, digits, sign)}"


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0 takes the sign off a zero


def _csv_row(metric: Metric, row: Row) -> list[object]:
    nothing = (None,) * len(Estimate._fields)
    n, *estimate = row.estimate or nothing
    pairs, *difference = row.difference or nothing
    return [
        *(metric.name, metric.unit, row.arm, n or 0, row.diverged, row.failed, *estimate),
        *(row.control, pairs or 0, *difference),
        " ".join(map(str, row.values)),
        " ".join(map(str, row.values.values())),
    ]
