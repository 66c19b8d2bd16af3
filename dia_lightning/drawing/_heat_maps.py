"""Figures of matrices, one panel each."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

VALUES_UP_TO = 10  # rows: beyond, numbers in cells are too small to read
COLUMNS = 4
MISSING = "#d9d9d9"  # grey, which neither colour map has


class HeatMap(NamedTuple):
    """A matrix and what stands above it; cells that are NaN are empty."""

    title: str
    matrix: npt.NDArray[np.float64]


def draw_heat_maps(
    maps: Sequence[HeatMap],
    *,
    title: str,
    label: str,
    axes: tuple[str, str],
    colours: str = "Blues",
    least: float = 0.0,
    first_row: int = 0,
    missing: str = MISSING,
) -> Figure:
    """Draw matrices side by side, in one colour scale; with up to 10 rows, cells show their values.

    Args:
        maps: at least one.
        title: line above all.
        label: what the values are.
        axes: what the columns are, and the rows.
        colours: name of a colour map of matplotlib.
        least: value of its first colour; that of its last is 1.
        first_row: number of the first row.
        missing: colour of cells without a value.
    """
    figure, panels = _panels([len(one.matrix) for one in maps])
    for ax, one in zip(panels, maps, strict=True):
        image = _draw(ax, one.matrix, cmap=colours, norm=Normalize(least, 1), first_row=first_row, missing=missing)
        ax.set_title(one.title, fontsize=10)
        ax.set_xlabel(axes[0])
        ax.set_ylabel(axes[1])
    figure.colorbar(image, ax=panels, label=label, aspect=30)
    figure.suptitle(title, fontsize=12)
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
    ax: Axes, matrix: npt.NDArray[np.float64], *, cmap: str, norm: Normalize, first_row: int, missing: str
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
                short_number(value),
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
            )
    return image


def short_number(value: float) -> str:
    """Return a number with two digits, without a sign where they are 0."""
    return f"{value:.2f}".replace("-0.00", "0.00")
