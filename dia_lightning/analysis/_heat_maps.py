"""Pictures of one number per pair of layers, a panel per stage."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from dia_lightning.analysis._names import stage_title
from dia_lightning.analysis.correlation import Protocol, StageCorrelation
from dia_lightning.analysis.importance import Layout, StageImportance

VALUES_UP_TO = 10  # layers: beyond, numbers in cells are too small to read
COLUMNS = 4
MISSING = "#d9d9d9"  # grey, which neither colour map has

_Matrix = npt.NDArray[np.float64]
_PROTOCOLS: dict[Protocol, str] = {
    "per-image": "over the channels of each image",
    "pooled": "over all images and channels",
    "centred": "over all images and channels, without each channel's mean",
}
_LAYOUTS: dict[Layout, str] = {"values": "one sample per image and channel", "images": "one sample per image"}


def draw_correlation(stages: Sequence[StageCorrelation], protocol: Protocol) -> Figure:
    """Draw the correlation matrices of all stages.

    Up to 10 layers the cells name their values. Grey cells are not defined, because a map does not vary.

    Args:
        stages: of :func:`map_correlation`.
        protocol: which one they were made by, for the title.
    """
    figure, panels = _panels([len(stage.layers) for stage in stages])
    for ax, stage in zip(panels, stages, strict=True):
        image = _draw(ax, stage.matrix.numpy(), cmap="RdBu_r", norm=Normalize(-1, 1))
        low, high = stage.interval
        mean = "" if math.isnan(stage.mean) else f"\nmean {_short(stage.mean)}"
        interval = "" if math.isnan(low) else f" [{_short(low)}, {_short(high)}]"
        ax.set_title(f"{stage_title(stage.stage, stage.layers)}{mean}{interval}", fontsize=10)
        ax.set_xlabel("layer")
        ax.set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="Pearson correlation", aspect=30)
    figure.suptitle(
        f"Correlation between attention maps of layers, protocol {protocol}\n({_PROTOCOLS[protocol]})", fontsize=12
    )
    return figure


def draw_importance(stages: Sequence[StageImportance]) -> Figure:
    """Draw how important each earlier layer is for the maps of a later one.

    Args:
        stages: of :func:`map_importance`; stages of a single layer are left out.

    Raises:
        ValueError: if no stage has more than one layer.
    """
    stages = [stage for stage in stages if len(stage.layers) > 1]
    if not stages:
        raise ValueError("No stage has more than one layer with attention, so no layer can be important to another.")
    figure, panels = _panels([len(stage.layers) - 1 for stage in stages])
    for ax, stage in zip(panels, stages, strict=True):
        shown = stage.matrix.numpy()[1:, :-1].copy()  # the first layer has no source, the last is none
        shown[np.triu_indices(len(shown), 1)] = np.nan
        image = _draw(ax, shown, cmap="Blues", norm=Normalize(0, 1), first_row=1, missing="white")
        explained = stage.explained[~stage.explained.isnan()].tolist() or [math.nan]
        ax.set_title(
            f"{stage_title(stage.stage, stage.layers)}\nR² {_short(min(explained))} to {_short(max(explained))}",
            fontsize=10,
        )
        ax.set_xlabel("source layer")
        ax.set_ylabel("target layer")
    figure.colorbar(image, ax=panels, label="importance (each row sums to 1)", aspect=30)
    figure.suptitle(
        f"Random forests that predict a layer's maps from those before it\n({_LAYOUTS[stages[0].layout]})", fontsize=12
    )
    return figure


def _panels(sizes: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """Make a figure with one square panel per matrix, large enough for cells with values."""
    columns = min(COLUMNS, len(sizes))
    rows = math.ceil(len(sizes) / columns)
    side = max(2.8, *(0.42 * size + 0.8 if size <= VALUES_UP_TO else 4.2 for size in sizes))
    figure = Figure(
        figsize=(max(side * columns + 1.2, 6.5), (side + 0.4) * rows + 0.6),
        dpi=100,
        facecolor="white",
        layout="constrained",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = list(grid.flat)
    for ax in panels[len(sizes) :]:
        ax.remove()
    return figure, panels[: len(sizes)]


def _draw(
    ax: Axes, matrix: _Matrix, *, cmap: str, norm: Normalize, first_row: int = 0, missing: str = MISSING
) -> AxesImage:
    rows, columns = matrix.shape
    ax.set_facecolor(missing)
    extent = (-0.5, columns - 0.5, first_row + rows - 0.5, first_row - 0.5)
    image = ax.imshow(np.ma.masked_invalid(matrix), cmap=cmap, norm=norm, extent=extent, interpolation="nearest")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(VALUES_UP_TO, integer=True, min_n_ticks=1))
    if rows <= VALUES_UP_TO:
        for row, column in np.argwhere(~np.isnan(matrix)):
            value = matrix[row, column]
            dark = sum(image.cmap(norm(value))[:3]) < 1.5
            colour = "white" if dark else "black"
            ax.text(
                column,
                first_row + row,
                _short(value),
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
            )
    return image


def _short(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")
