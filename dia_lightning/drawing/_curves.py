"""Figures of one value per layer, along the depth of a network."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, ORANGE, GREEN = "#4c78a8", "#e45756", "#54a24b"
LETTERS = 115  # of the names of stages that have room beside each other

Values = npt.NDArray[np.float64]


class Curve(NamedTuple):
    """A value per layer and the range around it, ``[L]`` each, and the names of both."""

    middle: Values
    low: Values
    high: Values
    name: str
    spread: str


def draw_map_values(values: Curve, closed: Values, opened: Values, *, bound: float, stages: Sequence[str]) -> Figure:
    """Draw the values of the maps of each layer, and below them the share that is saturated.

    Args:
        values: of the maps.
        closed: share of values near 0, ``[L]``.
        opened: share of values near the bound, ``[L]``.
        bound: of the maps.
        stages: name of the stage of each layer.
    """
    figure, (top, shares) = _figure(2)
    _band(top, values, BLUE)
    mean = values.middle
    top.set_ylim(min(0.0, mean.min()) - 0.02 * bound, max(bound, mean.max()) + 0.02 * bound)
    top.set_ylabel("value of the map")
    # the second is drawn over the first, and must not hide it where both are 0
    for share, colour, style, label in ((closed, ORANGE, "o-", "below 1 %"), (opened, GREEN, ".:", "above 99 %")):
        shares.plot(range(len(share)), share, style, color=colour, label=f"{label} of the bound {bound:g}")
    shares.spines[["top", "right"]].set_visible(False)
    shares.set_ylim(-0.02, 1.02)
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    shares.set_ylabel("share of the values")
    shares.set_xlabel("layer")
    for ax in (top, shares):
        _separate(ax, stages)
        legend_beside(ax)
    figure.suptitle("Values of the attention maps, and how many are saturated", fontsize=12)
    return figure


def draw_curves(
    curves: Sequence[Curve], blocks: Sequence[str], *, title: str, label: str, logarithmic: bool = False
) -> Figure:
    """Draw one or two curves over the blocks of a network.

    Args:
        curves: with a value per block; blocks whose value is NaN have no point.
        blocks: their names, by which they are divided into stages.
        title: line above.
        label: what the values are.
        logarithmic: whether the scale is; else it begins at 0.
    """
    figure, (ax,) = _figure(1)
    if logarithmic:
        positive = np.concatenate([curve.middle[curve.middle > 0] for curve in curves])
        floor = 0.01 * positive.min() if len(positive) else 1e-12  # zeros have no place on this scale
        curves = [_at_least(floor, curve) for curve in curves]
    for number, (curve, colour) in enumerate(zip(curves, (BLUE, ORANGE), strict=False)):
        _band(ax, curve, colour, offset=0.15 * number)
    if logarithmic:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_ylabel(label)
    ax.set_xlabel("block")
    _separate(ax, _containers(blocks))
    legend_beside(ax)
    figure.suptitle(title, fontsize=12)
    return figure


def _at_least(floor: float, curve: Curve) -> Curve:
    middle, low, high = (values.clip(floor) for values in curve[:3])
    return Curve(middle, low, high, curve.name, curve.spread)


def _figure(rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.0, 2.6 * rows + 1.2), dpi=100, facecolor="white", layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True).flat)


def _band(ax: Axes, curve: Curve, colour: str, offset: float = 0.0) -> None:
    positions = np.arange(len(curve.middle)) + offset
    ax.plot(positions, curve.middle, marker=".", color=colour, label=curve.name)
    # bars, because a block between two without a value would have no area
    ax.vlines(positions, curve.low, curve.high, color=colour, alpha=0.35, linewidth=3, label=curve.spread)
    ax.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    ax.spines[["top", "right"]].set_visible(False)


def legend_beside(ax: Axes) -> None:
    """Put the legend to the right of the axes."""
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
