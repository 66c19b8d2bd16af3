"""Pictures of one number per layer, along the depth of a network."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dia_lightning.analysis.gates import StageGates
from dia_lightning.analysis.gradients import GradientFlow, RelativeChange

BLUE, ORANGE, GREEN = "#4c78a8", "#e45756", "#54a24b"
NAMED_UP_TO = 6  # stages: the names of more would overlap

_Values = npt.NDArray[np.float64]


def draw_gates(stages: Sequence[StageGates]) -> Figure:
    """Draw mean and effective range of the maps of each layer, and the share of saturated values.

    Args:
        stages: of :func:`gate_statistics`.
    """
    figure, (values, shares) = _figure(2)
    mean = torch.cat([stage.mean.mean(1) for stage in stages]).numpy()
    low, high = (torch.cat([getattr(stage, name) for stage in stages]).numpy() for name in ("low", "high"))
    _band(values, mean, low, high, BLUE, "mean", "1 % to 99 % of the values")
    bound = max(stage.bound for stage in stages)
    values.set_ylim(min(0.0, mean.min()) - 0.02 * bound, max(bound, mean.max()) + 0.02 * bound)
    values.set_ylabel("value of the map")
    for name, colour, label in (("closed", ORANGE, "below 1 %"), ("open", GREEN, "above 99 %")):
        share = torch.cat([getattr(stage, name) for stage in stages]).numpy()
        shares.plot(range(len(share)), share, marker=".", color=colour, label=f"{label} of the bound {bound:g}")
    shares.spines[["top", "right"]].set_visible(False)
    shares.set_ylim(-0.02, 1.02)
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    shares.set_ylabel("share of the values")
    shares.set_xlabel("layer")
    names = [f"stage {stage.stage}" for stage in stages for _ in stage.layers]
    for ax in (values, shares):
        _separate(ax, names)
        _legend(ax)
    figure.suptitle("Values of the attention maps, and how many are saturated", fontsize=12)
    return figure


def draw_gradients(flow: GradientFlow) -> Figure:
    """Draw the size of the gradient at the output of each block, on a logarithmic scale.

    Args:
        flow: of :func:`gradient_flow`.
    """
    figure, (ax,) = _figure(1)
    low, _, high = flow.quantiles.numpy()
    positive = high[high > 0]
    floor = 1e-6 * float(positive.max()) if len(positive) else 1e-12  # zeros have no place on this scale
    _band(ax, flow.mean.numpy().clip(floor), low.clip(floor), high.clip(floor), BLUE, "mean", "5 % to 95 %")
    ax.set_yscale("log")
    ax.set_ylabel("|dLoss / d output|")
    ax.set_xlabel("block")
    _separate(ax, _containers(flow.blocks))
    _legend(ax)
    figure.suptitle("Gradient of the loss at the output of each block", fontsize=12)
    return figure


def draw_relative_change(change: RelativeChange) -> Figure:
    """Draw how much each block changes its input; blocks that change its shape have no point.

    Args:
        change: of :func:`relative_change`.
    """
    figure, (ax,) = _figure(1)
    mean, deviation = change.mean.numpy(), change.deviation.numpy()
    _band(ax, mean, mean - deviation, mean + deviation, BLUE, "mean over images", "one standard deviation")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("‖output - input‖ / ‖input‖")
    ax.set_xlabel("block")
    _separate(ax, _containers(change.blocks))
    _legend(ax)
    figure.suptitle("Relative change of the features in each block", fontsize=12)
    return figure


def _figure(rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.0, 2.6 * rows + 1.2), dpi=100, facecolor="white", layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True).flat)


def _band(ax: Axes, middle: _Values, low: _Values, high: _Values, colour: str, line: str, band: str) -> None:
    positions = np.arange(len(middle))
    ax.plot(positions, middle, marker=".", color=colour, label=line)
    # bars, because a block between two without a value would have no area
    ax.vlines(positions, low, high, color=colour, alpha=0.35, linewidth=3, label=band)
    ax.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes) -> None:
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _separate(ax: Axes, names: Sequence[str]) -> None:
    """Divide the layers where the name of their stage changes."""
    stages = [(name, len(list(same))) for name, same in groupby(names)]
    ax.set_xlim(-0.7, len(names) - 0.3)
    start = 0
    for name, count in stages:
        if start:
            ax.axvline(start - 0.5, color="grey", linewidth=0.8, linestyle=":")
        if len(stages) <= NAMED_UP_TO:
            middle = start + (count - 1) / 2
            ax.text(middle, 1.01, name, transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
        start += count


def _containers(blocks: Sequence[str]) -> list[str]:
    return [block.rpartition(".")[0] for block in blocks]
