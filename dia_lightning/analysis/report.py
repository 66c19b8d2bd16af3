"""The report of an analysis: text with tables, all values, and figures."""

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from dia_lightning import __version__
from dia_lightning._whole_files import written_whole
from dia_lightning.analysis import draw_correlation, draw_gates, draw_gradients, draw_importance, draw_relative_change
from dia_lightning.analysis.correlation import mean_correlation, mean_interval
from dia_lightning.analysis.findings import Analysis
from dia_lightning.analysis.tables import markdown, number, tables

UNKNOWN_PROTOCOL = (
    'Which protocol the "up to 0.85" of the paper (arXiv 2210.16101, abstract) rests on is not known, so these numbers '
    "cannot be compared with it. The first two protocols count differences between channels that are the same in "
    "every image; the third, centred, is free of them."
)


def write(
    analysis: Analysis, pictures: dict[str, Figure], folder: Path, *, checkpoint: Path | None, config: Path
) -> None:
    """Write ``result.json``, ``report.md`` and the figures.

    Args:
        analysis: the results.
        pictures: figures of the results, from :func:`figures`.
        folder: an existing folder.
        checkpoint: where the network is from; ``None`` if it was built from the config.
        config: where the data are from.

    Raises:
        ValueError: if a file cannot be written.
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
        raise ValueError(f"Cannot write to {folder} ({error.strerror}). Give another folder: --out.") from error


def report(analysis: Analysis, origin: str, pictures: list[str]) -> str:
    """Return the report as Markdown.

    Args:
        analysis: the results.
        origin: where the network is from.
        pictures: names of the figures' files.
    """
    subject = ", ".join(f"{name} {value}" for name, value in analysis.subject.items())
    correlations, layers, blocks = (markdown(table) for table in tables(analysis))
    parts = [
        "# What the attention does",
        f"{origin}: {subject}.",
        *analysis.notes,
        "## Correlation between layers",
        "Mean Pearson correlation over all pairs of different layers of a stage, with a 95 % interval (low to high) by "
        "bootstrap over images; left out is the share of correlations that are not defined.",
        correlations,
        UNKNOWN_PROTOCOL,
        advice(analysis),
        "## Values of the maps",
        "Deviation is over images (mean over channels); 1 % of the values are below and 1 % above the columns 1 % and "
        "99 %; closed and open are the shares of values below 1 % and above 99 % of the bound. Explained is the share "
        "of the variance that a random forest predicts from the maps of the layers before; at 0 or below, nothing.",
        layers,
        "## Blocks",
        "Gradient is the mean of |dLoss / d output|, with the loss summed over the images of a batch; change is "
        "‖output - input‖ / ‖input‖, mean over images.",
        blocks,
        "## Pictures",
        "\n\n".join(f"![{name}]({name})" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def origin(checkpoint: Path | None, config: Path) -> str:
    """Return where the network is from, as the start of a sentence."""
    return f"Network as `{config}` builds it, not trained here" if checkpoint is None else f"Checkpoint `{checkpoint}`"


def figures(analysis: Analysis) -> dict[str, Figure]:
    """Return the figures by name."""
    found = {f"correlation_{name}": draw_correlation(stages, name) for name, stages in analysis.correlations.items()}
    found["gates"] = draw_gates(analysis.gates)
    if any(len(stage.layers) > 1 for stage in analysis.importance):
        found["importance"] = draw_importance(analysis.importance)
    found["gradients"] = draw_gradients(analysis.gradients, analysis.without_shortcuts)
    found["relative_change"] = draw_relative_change(analysis.change)
    return found


def summary(analysis: Analysis) -> str:
    """Return the mean correlations and the recommendation, in a few lines."""
    lines = ["mean correlation between attention maps of layers (the paper's protocol is not known):"]
    for protocol, stages in analysis.correlations.items():
        of_stages = ", ".join(number(stage.mean) for stage in stages)
        lines.append(f"  {protocol:<10} {number(mean_correlation(stages))}   by stage: {of_stages}")
    return "\n".join([*lines, advice(analysis)])


def advice(analysis: Analysis) -> str:
    """Return the recommendation as a sentence."""
    found = analysis.recommendation
    if found is None:
        return (
            "A recommendation of layers to share a unit needs a network with a separate unit in every block "
            "(--model.share block, no plug): agreement between layers that already share one says nothing."
        )
    if found.plug is None and any(len(group) > 1 for groups in found.groups for group in groups):
        return (
            f"Consecutive layers have maps that correlate by {found.threshold:g} or more per image, but they fill no "
            "whole block, which is what --model.plug chooses."
        )
    if found.plug is None:
        return (
            f"No two consecutive layers of a stage have maps that correlate by {found.threshold:g} or more per image."
        )
    if analysis.subject.get("attention") == "None":
        groups = "; ".join(
            f"stage {stage}: layers {', '.join(map(str, group))}"
            for stage, groups in enumerate(found.groups)
            for group in groups
            if len(group) > 1
        )
        return (
            f"Of the network's own attention, consecutive layers whose maps correlate by {found.threshold:g} or more "
            f"per image could share a module ({groups}): --model.existing share. Train both to see."
        )
    return (
        f"Consecutive layers whose maps correlate by {found.threshold:g} or more per image could share a unit; for the "
        f'largest group of each stage: --model.share stage --model.plug "{found.plug}". Train both to see.'
    )


def _plain(value: Any) -> Any:
    """Return the values in a form that JSON can hold; NaN becomes null."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
