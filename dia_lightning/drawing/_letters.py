"""The font of pictures, and texts that fit into them."""

from functools import cache
from pathlib import Path

import matplotlib
from PIL import ImageFont


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font of matplotlib's pictures, which comes with it and knows more than Latin letters."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def short_label(text: str, length: int) -> str:
    """Return ``text`` as one line of at most ``length`` characters that matplotlib draws as it stands.

    Example:
        >>> short_label("american staffordshire terrier", 15)
        'american …rrier'
        >>> print(short_label("$5 bill", 15))
        \\$5 bill
    """
    return shorten(text, length).replace("$", r"\$")  # two dollar signs would start a formula


def shorten(text: str, length: int) -> str:
    """Return ``text`` as one line of at most ``length`` characters.

    The middle is left out, because long class names often share their beginning.
    """
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    tail = (length - 1) * 2 // 5
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]
