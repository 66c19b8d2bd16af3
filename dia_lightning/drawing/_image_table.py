"""Images in rows and columns, with headings and row names."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from dia_lightning.drawing._letters import font
from dia_lightning.drawing._pixels import to_picture

SMALLEST = 48  # width and height of an enlarged image in pixels
GAP, MARGIN = 4, 16
TITLE, TEXT = 18, 13  # heights of letters in pixels


def draw_table(
    rows: Sequence[Sequence[Tensor]], title: str, *, headings: Sequence[str] = (), names: Sequence[str] = ()
) -> Image.Image:
    """Draw images of one size row by row, each of its pixels as a square of pixels.

    Args:
        rows: images ``[C, H, W]`` in [0, 1] or of 8 bits; the last row may be shorter.
        title: line above all.
        headings: text above the columns; empty for none.
        names: text left of the rows; empty for none.

    Returns:
        An RGB picture in which images are at least 48 pixels high and wide, and wide enough for the headings.
    """
    height, width = rows[0][0].shape[1:]
    wide = max([SMALLEST, *(font(TEXT).getlength(heading) for heading in headings)])
    scale = max(1, math.ceil(wide / width), math.ceil(SMALLEST / height))
    cell = (scale * width, scale * height)
    left = MARGIN + max([0, *(math.ceil(font(TEXT).getlength(name)) + MARGIN // 2 for name in names)])
    top = MARGIN + 2 * TITLE + (TEXT + GAP + 2 if headings else 0)
    table = left + len(rows[0]) * (cell[0] + GAP) - GAP + MARGIN
    size = (max(table, round(font(TITLE).getlength(title)) + 2 * MARGIN), top + len(rows) * (cell[1] + GAP) + MARGIN)
    left += (size[0] - table) // 2
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((size[0] / 2, MARGIN), title, fill="black", font=font(TITLE), anchor="ma")
    for column, heading in enumerate(headings):
        middle = left + column * (cell[0] + GAP) + cell[0] / 2
        draw.text((middle, top - GAP - 2), heading, fill="black", font=font(TEXT), anchor="md")
    for number, row in enumerate(rows):
        y = top + number * (cell[1] + GAP)
        if names:
            draw.text((left - MARGIN // 2, y + cell[1] / 2), names[number], fill="black", font=font(TEXT), anchor="rm")
        for column, image in enumerate(row):
            shown = to_picture(image).resize(cell, Image.Resampling.NEAREST)
            picture.paste(shown, (left + column * (cell[0] + GAP), y))
    return picture
