"""Open image files so that each gives the right pixels, or an error that names the file."""

import os

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps

from dia_lightning.datamodules._formats import readable_formats

MAX_PIXELS = 50_000_000
"""Larger images are refused: a file of a few kilobytes can unpack to gigabytes."""


def load_image(
    path: str | os.PathLike[str], *, channels: int = 3, background: int = 255, bit_depth: int = 16
) -> Image.Image:
    """Open an image file with the right orientation, depth and number of channels.

    Grey, palette, 1-bit, CMYK and 16-bit files are converted by value (16 bits are scaled, not clipped), transparent
    pixels are composited over a plain background, EXIF rotation is applied, and the first frame of an animation or page
    of a document is used. Only Pillow decodes: ``torchvision.io.decode_image`` can crash the process on a damaged PNG.

    Args:
        path: the file.
        channels: 1 for grey, 3 for RGB.
        background: grey level under transparent pixels, 0 (black) to 255 (white).
        bit_depth: how many bits 16-bit files use, 1 to 16: 12 makes 4095 white. 8-bit files do not change.

    Returns:
        A fully read 8-bit image of mode ``L`` or ``RGB``.

    Raises:
        ValueError: if the file is empty, truncated, not an image, too large, or of unknown value range; the message
            names it.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True (another library set it), so damaged images would load half "
            "black without an error. Set it to False."
        )
    try:
        return _read(path, "L" if channels == 1 else "RGB", background, bit_depth)
    except Exception as error:  # Pillow's readers raise many types, including OSError, SyntaxError and struct.error
        raise _unreadable(path, error) from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the width and height that :func:`load_image` will give, from the header only.

    Raises:
        ValueError: if the header cannot be read; the message names the file.
    """
    try:
        with open_image(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by 90 degrees, perhaps also mirrored
            return (image.height, image.width) if turned else image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open a file without reading its pixels; only plain raster formats, whatever the file is called."""
    return Image.open(path, formats=readable_formats())


def deep_values(image: Image.Image) -> npt.NDArray[np.int64] | None:
    """Return the pixels of an open file with 16 bits per pixel; ``None`` for other depths."""
    # Older Pillow opens 16-bit files as 32-bit integers ("I"), so the mode does not determine the depth.
    if not image.mode.startswith("I"):
        return None
    values = np.asarray(image).astype(np.int64)
    return values if values.min() >= 0 and values.max() <= 65535 else None


def has_deep_colours(image: Image.Image) -> bool:
    """Return whether an open file has 16 bits per colour, of which Pillow gives the upper 8."""
    tiles = getattr(image, "tile", [])
    return image.format in ("PNG", "TIFF") and any(";16" in str(tile[3]) for tile in tiles)


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as an image ({error}). Replace or delete it.")


def _read(path: str | os.PathLike[str], mode: str, background: int, bit_depth: int) -> Image.Image:
    if os.path.getsize(path) == 0:
        raise ValueError("0 bytes")
    with open_image(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
        if bit_depth < 16 and image.mode[0] not in "IF" and has_deep_colours(image):
            raise ValueError(
                f"Pillow reads 8 bits of 16-bit colours, so bit_depth={bit_depth} is too late; save 8 bits"
            )
        return _to_mode(ImageOps.exif_transpose(image), mode, background, bit_depth)


def _to_mode(image: Image.Image, mode: str, background: int, bit_depth: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image, bit_depth)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (background, background, background, 255))
        image.alpha_composite(layer)
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _to_eight_bits(image: Image.Image, bit_depth: int) -> Image.Image:
    values, white = deep_values(image), 2**bit_depth - 1
    if values is None:
        raise ValueError(f"pixels of mode {image.mode} have no known white point; save it with 8 or 16 bits")
    if values.max() > white:
        raise ValueError(f"its brightest pixel is {values.max()}, but bit_depth={bit_depth} ends at {white}; raise it")
    return Image.fromarray(np.rint(values / (white / 255)).astype(np.uint8))
