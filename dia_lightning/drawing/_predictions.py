"""Draw a prediction grid."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from dia_lightning.drawing._letters import font, shorten
from dia_lightning.drawing._pixels import scaled, to_picture

RIGHT = "#1a7f37"  # green and red of equal darkness, readable on white
WRONG = "#cf222e"
CELL = 192  # largest width and height of an image in pixels
ENLARGED = 100  # pixels; the pixels of smaller images are drawn as squares
GAP, MARGIN = 8, 16
TITLE, TEXT, SMALLEST = 18, 13, 5  # heights of letters in pixels
NAME_LENGTH = 17  # characters


class Prediction(NamedTuple):
    """One image and the model's prediction; the image is [C, H, W] in [0, 1] on the CPU."""

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


def draw_predictions(predictions: Sequence[Prediction], names: Sequence[str], title: str) -> Image.Image:
    """Draw predictions row by row, each with its predicted class and probability above it.

    The second line names the true class; both are green where the answer is right and red where it is wrong.
    """
    columns = math.ceil(math.sqrt(len(predictions)))
    cells = [_fitted(prediction.image) for prediction in predictions]
    caption = 2 * TEXT + GAP
    step = caption + max(cell.height for cell in cells) + GAP
    head = MARGIN + 2 * TITLE
    grid = columns * (CELL + GAP) - GAP + 2 * MARGIN
    width = max(grid, math.ceil(font(TITLE).getlength(title)) + 2 * MARGIN)
    picture = Image.new("RGB", (width, head + math.ceil(len(cells) / columns) * step + MARGIN - GAP), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((width / 2, MARGIN), title, fill="black", font=font(TITLE), anchor="ma")
    for number, (prediction, cell) in enumerate(zip(predictions, cells, strict=True)):
        left = (width - grid) // 2 + MARGIN + number % columns * (CELL + GAP)
        top = head + number // columns * step
        _write_caption(draw, (left + CELL / 2, top), prediction, names)
        picture.paste(cell, (left + (CELL - cell.width) // 2, top + caption))
    return picture


def _fitted(image: Tensor) -> Image.Image:
    """Return an image in the size of its cell."""
    picture = to_picture(image)
    longest = max(picture.size)
    resampling = Image.Resampling.NEAREST if longest < ENLARGED else Image.Resampling.BICUBIC
    return scaled(picture, CELL / longest, resampling)


def _write_caption(
    draw: ImageDraw.ImageDraw, top: tuple[float, float], prediction: Prediction, names: Sequence[str]
) -> None:
    predicted = f"{shorten(names[prediction.predicted], NAME_LENGTH)} ({prediction.confidence:.0%})"
    true = f"true: {shorten(names[prediction.true], NAME_LENGTH)}"
    size = next((size for size in range(TEXT, SMALLEST, -1) if _widest(size, predicted, true) <= CELL), SMALLEST)
    for row, line in enumerate((predicted, true)):
        middle = (top[0], top[1] + (row + 0.5) * (TEXT + 2))
        draw.text(middle, line, fill=RIGHT if prediction.is_right else WRONG, font=font(size), anchor="mm")


def _widest(size: int, *lines: str) -> float:
    return max(font(size).getlength(line) for line in lines)
