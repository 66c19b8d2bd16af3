"""Draw the objects of one image: boxes, masks and labels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dia_lightning.drawing._letters import font, shorten
from dia_lightning.drawing._objects import ObjectClasses, Objects
from dia_lightning.drawing._pixels import scaled, to_picture

CROWDED = 20  # objects; beyond, labels are smaller, and those without a free place are left out
MOST_HIDDEN = 0.4  # of other labels and of boxes, added up, by a label in a crowded picture
NAME_LENGTH = 24  # characters
OPACITY = 0.4  # of masks
# Okabe and Ito's colours, which colour-blind readers tell apart, without black
_HUES = ((213, 94, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (204, 121, 167), (230, 159, 0))

Colour = tuple[int, int, int]


class Rectangle(NamedTuple):
    """A part of a picture in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Return the number of pixels."""
        return (self.right - self.left) * (self.bottom - self.top)

    def overlap(self, other: "Rectangle") -> float:
        """Return the number of pixels that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def hidden(self, others: "Sequence[Rectangle]") -> float:
        """Return the shares of the others that this one covers, added up."""
        return sum(self.overlap(other) / max(other.area, 1.0) for other in others)


def class_colour(label: int) -> Colour:
    """Return the colour of a class, the same in every picture; colours repeat after 21 classes.

    Example:
        >>> class_colour(1) == class_colour(22), class_colour(1) == class_colour(2)
        (True, False)
    """
    hue = _HUES[(label - 1) % len(_HUES)]
    shade = (label - 1) // len(_HUES) % 3  # as it is, darker, lighter
    return hue if shade == 0 else _mixed(hue, 0 if shade == 1 else 255)


def _mixed(colour: Colour, level: int) -> Colour:
    red, green, blue = ((part + level) // 2 for part in colour)
    return red, green, blue


def text_colour(background: Colour) -> Colour:
    """Return black or white, whichever is easier to read on the background."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def draw_objects(
    image: Tensor, objects: Objects, classes: ObjectClasses, *, scale: float = 1.0, text_size: int | None = None
) -> Image.Image:
    """Draw objects on an image.

    Args:
        image: pixels in [0, 1], ``[3, H, W]``.
        objects: what is in it; better detections are drawn on top.
        classes: names of the labels.
        scale: size of the picture, relative to the image.
        text_size: height of letters in pixels; ``None`` follows the size of the picture.

    Returns:
        An RGB picture.
    """
    picture = to_picture(image)
    if scale != 1.0:
        picture = scaled(picture, scale, Image.Resampling.BICUBIC)
    objects = objects.finite()
    if objects.scores is not None:
        objects = objects.only(objects.scores.argsort(stable=True))
    if objects.masks is not None:
        picture = _with_masks(picture, objects)
    if text_size is None:
        text_size = max(11, min(picture.size) // 40)
    if len(objects) > CROWDED:
        text_size = max(9, round(0.75 * text_size))
    width = max(1, text_size // (5 if objects.masks is None else 12))  # masks have their own outline
    boxes = [Rectangle(*(scale * edge for edge in box)) for box in objects.boxes.tolist()]
    draw = ImageDraw.Draw(picture)
    for box, label in zip(boxes, objects.labels.tolist(), strict=True):
        _draw_box(draw, picture.size, box, class_colour(label), width)
    _draw_labels(draw, picture.size, boxes, objects, classes, text_size)
    return picture


def _with_masks(picture: Image.Image, objects: Objects) -> Image.Image:
    assert objects.masks is not None
    pixels = np.array(picture)
    for mask, label in zip(objects.masks.numpy(), objects.labels.tolist(), strict=True):
        shown = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
        rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
        if len(rows) == 0:
            continue
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        colour, inside, area = np.array(class_colour(label)), shown[part], pixels[part]
        area[inside] = (1 - OPACITY) * area[inside] + OPACITY * colour
        area[_outline(inside)] = colour
    return Image.fromarray(pixels)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of a mask that have a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline: NDArray[np.bool_] = mask & ~inner
    return outline


def _draw_box(draw: ImageDraw.ImageDraw, size: tuple[int, int], box: Rectangle, colour: Colour, width: int) -> None:
    """Draw a box with a thin dark line around it, which keeps light colours visible on light images."""
    left, right = (min(max(round(edge), 0), size[0] - 1) for edge in (box.left, box.right))
    top, bottom = (min(max(round(edge), 0), size[1] - 1) for edge in (box.top, box.bottom))
    left, right, top, bottom = min(left, right), max(left, right), min(top, bottom), max(top, bottom)
    if width > 1:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0))
    draw.rectangle((left, top, right, bottom), outline=colour, width=width)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    boxes: list[Rectangle],
    objects: Objects,
    classes: ObjectClasses,
    text_size: int,
) -> None:
    """Write a label at each box, the best first, so that they hide as little as possible of each other and of boxes.

    Where it is crowded, a label without a free place is left out if its class has one already.
    """
    used: list[Rectangle] = []
    named: set[int] = set()
    letters, margin = font(text_size), max(1, text_size // 6)
    for i in reversed(range(len(boxes))):
        label = int(objects.labels[i])
        text = _label_text(objects, i, classes, letters, size[0] - 2 * margin)
        height, width = text_size + 2 * margin, letters.getlength(text) + 2 * margin
        places = _label_places(boxes[i], width, height, size)
        costs = [(round(place.hidden(used), 1), round(place.hidden(boxes), 1)) for place in places]
        if not text or (len(boxes) > CROWDED and label in named and sum(min(costs)) > MOST_HIDDEN):
            continue
        place = places[costs.index(min(costs))]
        used.append(place)
        named.add(label)
        colour = class_colour(label)
        draw.rectangle((place.left, place.top, place.right - 1, place.bottom - 1), fill=colour)
        middle = (place.left + margin, place.top + height / 2)
        draw.text(middle, text, fill=text_colour(colour), font=letters, anchor="lm")


def _label_text(objects: Objects, i: int, classes: ObjectClasses, letters: ImageFont.FreeTypeFont, room: float) -> str:
    """Return the label in as many characters as there is room for, perhaps none; an only class needs no name."""
    name = classes.name(int(objects.labels[i])) if classes.names is None or len(classes.names) > 1 else ""
    end = "" if objects.scores is None else f" {float(objects.scores[i]):.2f}"
    if objects.crowd is not None and objects.crowd[i]:
        end = " (crowd)"
    texts = [shorten(name, length) + end for length in range(min(len(name), NAME_LENGTH), 1, -1)] or [name + end]
    return next((text.strip() for text in (*texts, end) if letters.getlength(text) <= room), "")


def _label_places(box: Rectangle, width: float, height: float, size: tuple[int, int]) -> list[Rectangle]:
    """Return where the label of a box can stand within the picture, the best place first."""
    corners = [
        (box.left, box.top - height),
        (box.right - width, box.top - height),
        (box.left, box.bottom),
        (box.right - width, box.bottom),
        (box.left, box.top),
        (box.right - width, box.bottom - height),
    ]
    inside = [(left, top) for left, top in corners if 0 <= top <= size[1] - height] or corners[-2:]
    places = []
    for left, top in inside:
        left, top = min(max(left, 0), size[0] - width), min(max(top, 0), size[1] - height)
        places.append(Rectangle(round(left), round(top), round(left) + width, round(top) + height))
    return places
