"""Pictures of one number per layer, along the depth of a network."""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dia_lightning.analysis.gates import StageGates
from dia_lightning.analysis.gradients import GradientFlow, RelativeChange

BLUE, ORANGE, GREEN = "#4c78a8", "#e45756", "#54a24b"
LETTERS = 115  # of the names of stages that have room beside each other
HISTOGRAM_BINS = 40

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
    # the second is drawn over the first, and must not hide it where both are 0
    for name, colour, style, label in (("closed", ORANGE, "o-", "below 1 %"), ("open", GREEN, ".:", "above 99 %")):
        share = torch.cat([getattr(stage, name) for stage in stages]).numpy()
        shares.plot(range(len(share)), share, style, color=colour, label=f"{label} of the bound {bound:g}")
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


def draw_gradients(flow: GradientFlow, without: GradientFlow | None = None) -> Figure:
    """Draw the size of the gradient at the output of each block, on a logarithmic scale.

    Args:
        flow: of :func:`gradient_flow`.
        without: the same of the same blocks within :func:`without_shortcuts`.
    """
    figure, (ax,) = _figure(1)
    flows = [flow] if without is None else [flow, without]
    positive = torch.cat([one.mean[one.mean > 0] for one in flows])
    floor = 0.01 * float(positive.min()) if len(positive) else 1e-12  # zeros have no place on this scale
    names = ["mean"] if without is None else ["with shortcuts", "without shortcuts"]
    for one, colour, name in zip(flows, (BLUE, ORANGE), names, strict=False):
        low, _, high = one.quantiles.numpy().clip(floor)
        _band(ax, one.mean.numpy().clip(floor), low, high, colour, name, "5 % to 95 %", offset=0.15 * (one is without))
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


def draw_stage_gradients(stages: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the distribution over training steps of the size of the gradient at the output of each stage.

    Args:
        stages: the mean ``|dLoss / d output|`` of each step by name of the stage; not finite or 0 is left out.
    """
    found = {name: np.asarray(values, dtype=np.float64) for name, values in stages.items()}
    found = {name: values[np.isfinite(values) & (values > 0)] for name, values in found.items()}
    figure = Figure(figsize=(8.0, 1.3 * len(found) + 1.3), dpi=100, facecolor="white", layout="constrained")
    panels = list(figure.subplots(len(found), 1, squeeze=False, sharex=True).flat)
    logarithms = np.log10(np.concatenate(list(found.values())))
    low, high = (logarithms.min(), logarithms.max()) if len(logarithms) else (-1.0, 0.0)
    bins = np.logspace(low - 0.05, high + 0.05, HISTOGRAM_BINS + 1)
    for ax, (name, values) in zip(panels, found.items(), strict=True):
        ax.hist(values, bins=bins, color=BLUE)
        if len(values):
            median = float(np.median(values))
            ax.axvline(median, color=ORANGE, linewidth=1.2, label=f"median {median:.2g}")
            _legend(ax)
        ax.set_xscale("log")
        ax.set_title(f"{name}, {len(values)} steps", fontsize=8, loc="left")
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("mean |dLoss / d output| of a training step")
    figure.supylabel("steps", fontsize=10)
    figure.suptitle("Gradient at the output of each stage, over training steps", fontsize=12)
    return figure


def _figure(rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.0, 2.6 * rows + 1.2), dpi=100, facecolor="white", layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True).flat)


def _band(
    ax: Axes, middle: _Values, low: _Values, high: _Values, colour: str, line: str, band: str, offset: float = 0.0
) -> None:
    positions = np.arange(len(middle)) + offset
    ax.plot(positions, middle, marker=".", color=colour, label=line)
    # bars, because a block between two without a value would have no area
    ax.vlines(positions, low, high, color=colour, alpha=0.35, linewidth=3, label=band)
    ax.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes) -> None:
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _separate(ax: Axes, names: Sequence[str]) -> None:
    """Divide the layers where the name of their stage changes, and name the stages if there is room."""
    stages = [(name, len(list(same))) for name, same in groupby(names)]
    letter = len(names) / LETTERS
    fit = all(
        (len(name) + len(after) + 1) * letter <= count + following
        for (name, count), (after, following) in pairwise(stages)
    )
    ax.set_xlim(-0.7, len(names) - 0.3)
    start = 0
    for name, count in stages:
        if start:
            ax.axvline(start - 0.5, color="grey", linewidth=0.8, linestyle=":")
        if fit:
            middle = start + (count - 1) / 2
            ax.text(middle, 1.01, name, transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=7)
        start += count


def _containers(blocks: Sequence[str]) -> list[str]:
    """Return what the blocks are in, without the end that all names have in common."""
    containers = [block.split(".")[:-1] for block in blocks]
    while len(set(map(tuple, containers))) > 1 and len({tuple(parts[-1:]) for parts in containers}) == 1:
        containers = [parts[:-1] for parts in containers]
    return [".".join(parts) for parts in containers]
