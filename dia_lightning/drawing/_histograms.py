"""Figures of the distribution of values."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dia_lightning.drawing._curves import BLUE, ORANGE, legend_beside

HISTOGRAM_BINS = 40


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
            legend_beside(ax)
        ax.set_xscale("log")
        ax.set_title(f"{name}, {len(values)} steps", fontsize=8, loc="left")
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("mean |dLoss / d output| of a training step")
    figure.supylabel("steps", fontsize=10)
    figure.suptitle("Gradient at the output of each stage, over training steps", fontsize=12)
    return figure
