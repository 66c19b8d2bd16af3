"""The results of an analysis as files: tables, numbers and pictures."""

import json
import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from dia_lightning import __version__
from dia_lightning._whole_files import written_whole
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
from dia_lightning.cli._analysis_tables import advice, number, report
from dia_lightning.cli._errors import UserError


@dataclass(frozen=True)
class Analysis:
    """Everything that the command ``analyze`` finds out.

    Args:
        subject: what was analyzed, by name.
        notes: sentences about what these numbers mean for this task and network.
        correlations: per protocol and stage.
        gates: per stage.
        importance: per stage.
        recommendation: ``None`` for a network whose layers share units already, or that has ``plug``.
        gradients: of the loss, summed over the images of a batch.
        without_shortcuts: the same with the same weights and no shortcuts; ``None`` for networks that need theirs.
        change: of the features.
    """

    subject: dict[str, str | int]
    notes: list[str]
    correlations: dict[Protocol, list[StageCorrelation]]
    gates: list[StageGates]
    importance: list[StageImportance]
    recommendation: Recommendation | None
    gradients: GradientFlow
    without_shortcuts: GradientFlow | None
    change: RelativeChange


def write(
    analysis: Analysis, pictures: dict[str, Figure], folder: Path, *, checkpoint: Path | None, config: Path
) -> None:
    """Write ``result.json``, ``report.md`` and the pictures.

    Args:
        analysis: the results.
        pictures: of them, from :func:`figures`.
        folder: which exists.
        checkpoint: where the network is from, ``None`` if it was built from the config.
        config: where the data are from.

    Raises:
        UserError: if a file cannot be written.
    """
    source = {"checkpoint": None if checkpoint is None else str(checkpoint), "config": str(config)}
    result = {"version": __version__, **source, **_plain(analysis)}
    result["mean_correlations"] = _plain(
        {
            name: {"mean": mean_correlation(of), "interval": mean_interval(of)}
            for name, of in analysis.correlations.items()
        }
    )
    text = report(analysis, origin(checkpoint, config), [f"{name}.png" for name in pictures])
    try:
        for name, content in (("result.json", json.dumps(result, allow_nan=False)), ("report.md", text)):
            with written_whole(folder / name) as part:
                part.write_text(content, encoding="utf-8")
        for name, figure in pictures.items():
            with written_whole(folder / f"{name}.png") as part:
                figure.savefig(part, format="png")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}). Give another folder: --out.") from error


def origin(checkpoint: Path | None, config: Path) -> str:
    """Return where the network is from, as the start of a sentence."""
    return f"Network as `{config}` builds it, not trained here" if checkpoint is None else f"Checkpoint `{checkpoint}`"


def figures(analysis: Analysis) -> dict[str, Figure]:
    """Return the pictures by name."""
    found = {f"correlation_{name}": draw_correlation(stages, name) for name, stages in analysis.correlations.items()}
    found["gates"] = draw_gates(analysis.gates)
    if any(len(stage.layers) > 1 for stage in analysis.importance):
        found["importance"] = draw_importance(analysis.importance)
    found["gradients"] = draw_gradients(analysis.gradients, analysis.without_shortcuts)
    found["relative_change"] = draw_relative_change(analysis.change)
    return found


def summary(analysis: Analysis) -> str:
    """Return the means of the correlations and the recommendation, as a few lines."""
    lines = ["mean correlation between attention maps of layers (the paper's protocol is not known):"]
    for protocol, stages in analysis.correlations.items():
        of_stages = ", ".join(number(stage.mean) for stage in stages)
        lines.append(f"  {protocol:<10} {number(mean_correlation(stages))}   by stage: {of_stages}")
    return "\n".join([*lines, advice(analysis)])


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
