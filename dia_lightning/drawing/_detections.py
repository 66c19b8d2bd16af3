"""Draw a detection grid: ground truth on the left, prediction on the right."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from dia_lightning.drawing._boxes_and_masks import NAME_LENGTH, class_colour, draw_objects
from dia_lightning.drawing._letters import font, shorten
from dia_lightning.drawing._objects import ObjectClasses, Objects

CELL = (720, 540)  # largest width and height of an image in pixels
NARROWEST = 320  # column in pixels, wide enough for what is written below an image
GAP = 16
TITLE, HEADING, TEXT = 22, 18, 14  # heights of letters in pixels
BLACK, GREY = (0, 0, 0), (90, 90, 90)


class Scene(NamedTuple):
    """One image ``[3, H, W]`` in [0, 1] on the CPU, what is in it, and what the model finds in it."""

    image: Tensor
    true: Objects
    found: Objects
    sample: int

    @property
    def labels(self) -> set[int]:
        """Return the classes that are drawn."""
        return {*self.true.labels.tolist(), *self.found.labels.tolist()}


def draw_detections(
    scenes: Sequence[Scene], classes: ObjectClasses, *, title: str, score_threshold: float
) -> Image.Image:
    """Draw images row by row, each twice: with its true objects on the left, with the detections on the right.

    Below the title stand the colours of the classes that are drawn. Small images are enlarged, large ones reduced.
    """
    rows = [_draw_scene(scene, classes) for scene in scenes]
    column = max(NARROWEST, *(cell.width for cells in rows for cell in cells))
    width = max(2 * column + 3 * GAP, round(font(TITLE).getlength(title)) + 2 * GAP)
    legend = _legend_lines(scenes, classes, width - 2 * GAP)
    head = GAP + 2 * TITLE + 2 * TEXT * len(legend) + 2 * HEADING
    heights = [cells[0].height + 2 * TEXT + GAP for cells in rows]
    picture = Image.new("RGB", (width, head + sum(heights)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((width / 2, GAP), title, fill=BLACK, font=font(TITLE), anchor="ma")
    _draw_legend(draw, legend, GAP + 2 * TITLE)
    lefts = (GAP, 2 * GAP + column)
    for left, heading in zip(lefts, ("ground truth", "prediction"), strict=True):
        draw.text((left + column / 2, head - HEADING), heading, fill=BLACK, font=font(HEADING), anchor="mm")
    top = head
    for scene, cells, height in zip(scenes, rows, heights, strict=True):
        for left, cell, text in zip(lefts, cells, _captions(scene, score_threshold), strict=True):
            picture.paste(cell, (left + (column - cell.width) // 2, top))
            draw.text((left + column / 2, top + cell.height + 6), text, fill=GREY, font=font(TEXT), anchor="ma")
        top += height
    return picture


def _draw_scene(scene: Scene, classes: ObjectClasses) -> list[Image.Image]:
    height, width = scene.image.shape[1:]
    scale = min(CELL[0] / width, CELL[1] / height)
    return [
        draw_objects(scene.image, objects, classes, scale=scale, text_size=15) for objects in (scene.true, scene.found)
    ]


def _captions(scene: Scene, score_threshold: float) -> tuple[str, str]:
    return (
        f"sample {scene.sample}: {_counted(len(scene.true), 'object')}",
        f"{_counted(len(scene.found), 'detection')} above {score_threshold:g}",
    )


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'s' if count > 1 else ''}"


def _legend_lines(scenes: Sequence[Scene], classes: ObjectClasses, room: float) -> list[list[tuple[float, int, str]]]:
    """Return the lines of the legend: the place from the left, the label and the name of each drawn class."""
    labels = sorted(set().union(*(scene.labels for scene in scenes)))
    lines: list[list[tuple[float, int, str]]] = []
    left = room
    for label in labels:
        name = shorten(classes.name(label), NAME_LENGTH)
        width = font(TEXT).getlength(name) + 3 * TEXT
        if left + width > room:
            lines.append([])
            left = 0.0
        lines[-1].append((GAP + left, label, name))
        left += width
    return lines


def _draw_legend(draw: ImageDraw.ImageDraw, lines: list[list[tuple[float, int, str]]], top: int) -> None:
    for line in lines:
        for left, label, name in line:
            draw.rectangle((left, top, left + TEXT, top + TEXT), fill=class_colour(label), outline=BLACK)
            middle = (left + 1.5 * TEXT, top + TEXT / 2)
            draw.text(middle, name, fill=BLACK, font=font(TEXT), anchor="lm")
        top += 2 * TEXT
