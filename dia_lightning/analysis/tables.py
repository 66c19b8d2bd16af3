"""The tables of an analysis, and its summary metrics."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from dia_lightning.analysis.correlation import mean_correlation, mean_interval
from dia_lightning.analysis.findings import Analysis

Cell: TypeAlias = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of values; those of a column have the same type, or are ``None`` where there is no value.

    Args:
        name: of the table.
        columns: names of the columns.
        rows: cells, in the order of the columns.
    """

    name: str
    columns: list[str]
    rows: list[list[Cell]]


def tables(analysis: Analysis) -> list[Table]:
    """Return the tables: correlations per stage, values per layer, gradients and changes per block."""
    return [_correlations(analysis), _layers(analysis), _blocks(analysis)]


def scalars(analysis: Analysis) -> dict[str, float]:
    """Return the main metrics by name, without undefined ones."""
    found: dict[str, float] = {}
    for protocol, stages in analysis.correlations.items():
        found[f"correlation/{protocol}"] = mean_correlation(stages)
        found |= {f"correlation/{protocol}_stage{stage.stage}": stage.mean for stage in stages}
    for name, flow in (("gradient", analysis.gradients), ("gradient_without_shortcuts", analysis.without_shortcuts)):
        if flow is not None:
            found |= {f"{name}/first_block": float(flow.mean[0]), f"{name}/last_block": float(flow.mean[-1])}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def number(value: float | None) -> str:
    """Return a number with three decimals, or a dash if there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _correlations(analysis: Analysis) -> Table:
    rows: list[list[Cell]] = []
    for protocol, stages in analysis.correlations.items():
        for stage in stages:
            low, high = stage.interval
            rows.append([protocol, str(stage.stage), len(stage.layers), stage.mean, low, high, stage.undefined])
        low, high = mean_interval(stages)
        layers = sum(len(stage.layers) for stage in stages)
        rows.append([protocol, "all", layers, mean_correlation(stages), low, high, None])
    return Table("correlations", ["protocol", "stage", "layers", "mean", "low", "high", "left out"], _defined(rows))


def _layers(analysis: Analysis) -> Table:
    rows: list[list[Cell]] = [
        [
            str(stage.stage),
            layer,
            float(stage.mean[index].mean()),
            float(stage.deviation[index].mean()),
            float(stage.lowest[index].min()),
            float(stage.highest[index].max()),
            float(stage.low[index]),
            float(stage.high[index]),
            float(stage.closed[index]),
            float(stage.open[index]),
            float(forests.explained[index]),
        ]
        for stage, forests in zip(analysis.gates, analysis.importance, strict=True)
        for index, layer in enumerate(stage.layers)
    ]
    columns = ["stage", "layer", "mean", "deviation", "min", "max", "1 %", "99 %", "closed", "open", "explained"]
    return Table("layers", columns, _defined(rows))


def _blocks(analysis: Analysis) -> Table:
    flows = {"gradient": analysis.gradients}
    if analysis.without_shortcuts is not None:
        flows["gradient without shortcuts"] = analysis.without_shortcuts
    values = [
        analysis.gradients.blocks,
        *(flow.mean.tolist() for flow in flows.values()),
        analysis.change.mean.tolist(),
    ]
    rows: list[list[Cell]] = [list(row) for row in zip(*values, strict=True)]
    return Table("blocks", ["block", *flows, "change"], _defined(rows))


def _defined(rows: list[list[Cell]]) -> list[list[Cell]]:
    return [[None if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows]


# formats of columns that ``number`` does not format
_FORMATS: dict[str, Callable[[float], str]] = {
    "gradient": "{:.3g}".format,
    "gradient without shortcuts": "{:.3g}".format,
    "closed": "{:.1%}".format,
    "open": "{:.1%}".format,
    "left out": "{:.0%}".format,
}


def markdown(table: Table) -> str:
    """Return a table in Markdown, with numbers rounded for reading."""
    rows = [[_text(cell, column) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows]
    lines = [table.columns, ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(cell: Cell, column: str) -> str:
    if isinstance(cell, (str, int)):
        return str(cell)
    return number(cell) if cell is None else _FORMATS.get(column, number)(cell)
