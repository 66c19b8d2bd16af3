"""Which classes a classifier confuses, from counts."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from dia_lightning.drawing._letters import short_label

CELL_TEXT_UP_TO = 20  # classes
NAMED_TICKS_UP_TO = 100
BARS = 30


def draw_confusion_matrix(counts: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Draw counts [K, K], rows true and columns predicted, as shares of their row."""
    classes = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels = [short_label(name, 20) for name in names] if classes <= NAMED_TICKS_UP_TO else []
    longest = max(map(len, labels), default=0)
    per_class = 0.5 if classes <= CELL_TEXT_UP_TO else 0.11
    side = float(np.clip(per_class * classes, 2.5, 11.0)) + 1.5 + 0.06 * longest
    figure = Figure(figsize=(side + 1.0, side), dpi=100, facecolor="white", layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0))
    bar = figure.colorbar(image, ax=ax, shrink=0.8, ticks=[0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.set_label("share of the true class")
    total = int(counts.sum())
    ax.set_title(f"accuracy {counts.trace() / total:.2%} of {total:,} samples")
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    if labels:  # otherwise matplotlib numbers as many rows as can be read
        _label_ticks(ax, labels)
    if classes <= CELL_TEXT_UP_TO:
        _write_cells(ax, counts, shares)
    return figure


def _label_ticks(ax: Axes, labels: list[str]) -> None:
    size = 9.0 if len(labels) <= CELL_TEXT_UP_TO else 7.0
    upright = max(len(label) for label in labels) > 3 or len(labels) > CELL_TEXT_UP_TO
    ax.set_xticks(range(len(labels)), labels, fontsize=size, rotation=90 if upright else 0)
    ax.set_yticks(range(len(labels)), labels, fontsize=size)


def _write_cells(ax: Axes, counts: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    for row, column in np.argwhere(counts > 0):
        share = shares[row, column]
        percent = f"{share:.0%}" if share >= 0.01 else "<1%"
        colour = "white" if share > 0.3 else "black"
        text = f"{percent}\n{counts[row, column]}"
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def draw_class_accuracy(counts: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Draw the accuracy of each class, or of the worst ones, from counts [K, K]."""
    totals = counts.sum(1)
    present = np.flatnonzero(totals)
    accuracy = counts.diagonal() / np.maximum(totals, 1)
    shown, which = present, "accuracy per class"
    if len(present) > BARS:
        shown = present[np.argsort(accuracy[present], kind="stable")[:BARS]]
        which = f"accuracy of the {BARS} worst of {len(present)} classes"
    figure = Figure(figsize=(7.0, 0.24 * len(shown) + 1.4), dpi=100, facecolor="white", layout="constrained")
    ax = figure.subplots()
    ax.barh(range(len(shown)), accuracy[shown], color="#4c78a8")
    for row, number in enumerate(shown):
        ax.text(1.03, row, f"{accuracy[number]:.1%} of {totals[number]}", va="center", fontsize=8)
    mean = float(accuracy[present].mean())
    ax.axvline(mean, color="black", linewidth=1, linestyle="--")
    ax.set_title(f"{which} (dashed: mean of the classes, {mean:.2%})", fontsize=11)
    ax.set_yticks(range(len(shown)), [short_label(names[int(i)], 30) for i in shown], fontsize=9)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(0.0, 1.25)
    ax.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.spines[["top", "right"]].set_visible(False)
    return figure
