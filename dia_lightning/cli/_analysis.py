"""The results of an analysis as files: tables, numbers and pictures."""

import json
import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from dia_lightning import __version__
from dia_lightning.analysis import (
    GradientFlow,
    Protocol,
    Recommendation,
    RelativeChange,
    StageCorrelation,
    StageGates,
    StageImportance,
    draw_correlation,
    draw_gates,
    draw_gradients,
    draw_importance,
    draw_relative_change,
    mean_correlation,
    mean_interval,
)
from dia_lightning.cli._errors import UserError

UNKNOWN_PROTOCOL = (
    'Which protocol the "up to 0.85" of the paper (arXiv 2210.16101, abstract) rests on is not known, so these numbers '
    "cannot be compared with it. The first two protocols count differences between channels that are the same in "
    "every image; the third, centred, is free of them."
)


@dataclass(frozen=True)
class Analysis:
    """Everything that the command ``analyze`` finds out.

    Args:
        subject: what was analyzed, by name.
        correlations: per protocol and stage.
        gates: per stage.
        importance: per stage.
        recommendation: ``None`` for a network that was trained with ``plug``.
        gradients: of the loss, summed over the images of a batch.
        change: of the features.
    """

    subject: dict[str, str | int]
    correlations: dict[Protocol, list[StageCorrelation]]
    gates: list[StageGates]
    importance: list[StageImportance]
    recommendation: Recommendation | None
    gradients: GradientFlow
    change: RelativeChange


def write(analysis: Analysis, folder: Path, checkpoint: str) -> None:
    """Write ``result.json``, ``report.md`` and the pictures.

    Args:
        analysis: the results.
        folder: which exists.
        checkpoint: where the network is from.

    Raises:
        UserError: if a file cannot be written.
    """
    result = {"version": __version__, "checkpoint": checkpoint, **_plain(analysis)}
    result["mean_correlations"] = _plain(
        {
            name: {"mean": mean_correlation(of), "interval": mean_interval(of)}
            for name, of in analysis.correlations.items()
        }
    )
    figures = _figures(analysis)
    try:
        (folder / "result.json").write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
        (folder / "report.md").write_text(_report(analysis, checkpoint, list(figures)), encoding="utf-8")
        for name, figure in figures.items():
            figure.savefig(folder / name)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}). Give another folder: --out.") from error


def summary(analysis: Analysis) -> str:
    """Return the means of the correlations and the recommendation, as a few lines."""
    lines = ["mean correlation between attention maps of layers (the paper's protocol is not known):"]
    for protocol, stages in analysis.correlations.items():
        of_stages = ", ".join(_number(stage.mean) for stage in stages)
        lines.append(f"  {protocol:<10} {_number(mean_correlation(stages))}   by stage: {of_stages}")
    return "\n".join([*lines, _advice(analysis)])


def _figures(analysis: Analysis) -> dict[str, Figure]:
    figures = {
        f"correlation_{name}.png": draw_correlation(stages, name) for name, stages in analysis.correlations.items()
    }
    figures["gates.png"] = draw_gates(analysis.gates)
    if any(len(stage.layers) > 1 for stage in analysis.importance):
        figures["importance.png"] = draw_importance(analysis.importance)
    figures["gradients.png"] = draw_gradients(analysis.gradients)
    figures["relative_change.png"] = draw_relative_change(analysis.change)
    return figures


# ---- tables


def _report(analysis: Analysis, checkpoint: str, pictures: list[str]) -> str:
    subject = ", ".join(f"{name} {value}" for name, value in analysis.subject.items())
    parts = [
        "# What the attention does",
        f"Checkpoint `{checkpoint}`: {subject}.",
        "## Correlation between layers",
        "Mean Pearson correlation over all pairs of different layers of a stage, with a 95 % interval by bootstrap "
        "over images.",
        _correlation_table(analysis),
        UNKNOWN_PROTOCOL,
        _advice(analysis),
        "## Values of the maps",
        "Deviation is over images (mean over channels); the effective range has 1 % of the values below and above; "
        "closed and open are the shares of values below 1 % and above 99 % of the bound. Explained is the share of the "
        "variance that a random forest predicts from the maps of the layers before.",
        _layer_table(analysis),
        "## Blocks",
        "Gradient is the mean of |dLoss / d output|, with the loss summed over the images of a batch; change is "
        "‖output - input‖ / ‖input‖, mean over images.",
        _block_table(analysis),
        "## Pictures",
        "\n\n".join(f"![{name}]({name})" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _correlation_table(analysis: Analysis) -> str:
    protocols = list(analysis.correlations)
    rows = []
    for stages in zip(*analysis.correlations.values(), strict=True):
        cells = [_with_interval(stage.mean, stage.interval) + _left_out(stage) for stage in stages]
        rows.append([str(stages[0].stage), str(len(stages[0].layers)), *cells])
    means = [_with_interval(mean_correlation(of), mean_interval(of)) for of in analysis.correlations.values()]
    count = sum(len(stage.layers) for stage in analysis.gates)
    return _table(["stage", "layers", *protocols], [*rows, ["all", str(count), *means]])


def _with_interval(mean: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return "-" if math.isnan(mean) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _left_out(stage: StageCorrelation) -> str:
    return f", {stage.undefined:.0%} left out" if stage.undefined > 0 else ""


def _layer_table(analysis: Analysis) -> str:
    rows = [
        [
            str(stage.stage),
            layer,
            _number(float(stage.mean[number].mean())),
            _number(float(stage.deviation[number].mean())),
            _number(float(stage.lowest[number].min())),
            _number(float(stage.highest[number].max())),
            f"{float(stage.low[number]):.3f} to {float(stage.high[number]):.3f}",
            f"{float(stage.closed[number]):.1%}",
            f"{float(stage.open[number]):.1%}",
            _number(float(forests.explained[number])),
        ]
        for stage, forests in zip(analysis.gates, analysis.importance, strict=True)
        for number, layer in enumerate(stage.layers)
    ]
    header = ["stage", "layer", "mean", "deviation", "min", "max", "effective range", "closed", "open", "explained"]
    return _table(header, rows)


def _block_table(analysis: Analysis) -> str:
    values = zip(
        analysis.gradients.blocks, analysis.gradients.mean.tolist(), analysis.change.mean.tolist(), strict=True
    )
    rows = [[block, f"{gradient:.3g}", _number(change)] for block, gradient, change in values]
    return _table(["block", "gradient", "change"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _advice(analysis: Analysis) -> str:
    found = analysis.recommendation
    if found is None:
        return (
            "The network was trained with plug; which layers could share a unit is told for attention in every block."
        )
    if found.plug is None:
        return (
            f"No two consecutive layers of a stage have maps that correlate by {found.threshold:g} or more per image."
        )
    return (
        f"Consecutive layers whose maps correlate by {found.threshold:g} or more per image could share a unit; for the "
        f'largest group of each stage: --model.share stage --model.plug "{found.plug}". Train both to see.'
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


# ---- JSON


def _plain(value: Any) -> Any:
    """Return what JSON can hold; not-a-number becomes null."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
