"""The drawing of a prediction grid."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from torch import Tensor

from dia_lightning.callbacks._class_names import short_label

RIGHT = "#1a7f37"  # green and red of equal darkness, readable on white
WRONG = "#cf222e"
CELL_WIDTH = 2.0  # inches
FONT_SIZE = 9.0


class Prediction(NamedTuple):
    """One image and what the model says about it; the image is [C, H, W] in [0, 1] on the CPU."""

    image: Tensor
    true: int
    predicted: int
    confidence: float
    sample: int
    num_classes: int

    @property
    def is_right(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.true == self.predicted


def draw_grid(predictions: Sequence[Prediction], names: Sequence[str], title: str) -> Figure:
    """Draw predictions row by row, each with its predicted class and probability above it.

    The second line names the true class; both are green where the answer is right and red where it is wrong.
    """
    columns = math.ceil(math.sqrt(len(predictions)))
    rows = math.ceil(len(predictions) / columns)
    figure = Figure(
        figsize=(max(CELL_WIDTH * columns, 5.0), 2.3 * rows + 0.5), dpi=100, facecolor="white", layout="constrained"
    )
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, prediction in zip(axes, predictions, strict=False):
        _draw_cell(ax, prediction, names)
    return figure


def _draw_cell(ax: Axes, prediction: Prediction, names: Sequence[str]) -> None:
    image = prediction.image
    if image.shape[0] != 3:
        image = image.mean(0, keepdim=True)  # grey, or channels without a colour of their own
    pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
    enlarged = max(image.shape[1:]) < 100
    ax.imshow(pixels, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest" if enlarged else "antialiased")
    predicted = f"{short_label(names[prediction.predicted], 17)} ({prediction.confidence:.0%})"
    true = f"true: {short_label(names[prediction.true], 17)}"
    colour = RIGHT if prediction.is_right else WRONG
    ax.set_title(f"{predicted}\n{true}", fontsize=_fitting_size(predicted, true), color=colour)


def _fitting_size(*lines: str) -> float:
    """Return the font size at which the widest line fits above its cell."""
    width = max(TextPath((0, 0), line, size=FONT_SIZE).get_extents().width for line in lines)
    return FONT_SIZE * min(1.0, 0.92 * CELL_WIDTH * 72 / max(width, 1.0))  # 72 points are an inch
