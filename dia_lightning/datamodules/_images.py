"""Opening image files so that every kind of file gives the right pixels, or an error that names the file."""

import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""File endings that count as images (in any case); everything else in a folder is ignored."""

MAX_PIXELS = 50_000_000
"""Larger images are refused: a file of a few kilobytes can unpack to gigabytes."""


def load_image(path: str | os.PathLike[str], *, channels: int = 3, background: int = 255) -> Image.Image:
    """Open an image file with the right orientation, depth and number of channels.

    Grey, palette, 1-bit, CMYK and 16-bit files are converted by value (16 bits are scaled, not clipped), transparent
    pixels are laid over a plain background, EXIF rotation is applied, and the first frame of an animation is taken.
    Only Pillow decodes: ``torchvision.io.decode_image`` can end the process on a damaged PNG.

    Args:
        path: the file.
        channels: 1 for grey, 3 for RGB.
        background: grey level under transparent pixels, 0 (black) to 255 (white).

    Returns:
        A fully read 8-bit image of mode ``L`` or ``RGB``.

    Raises:
        ValueError: if the file is empty, truncated, no image, too large, or of unknown value range; the message
            names it.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True (another library set it), so damaged images would load half "
            "black without an error. Set it to False."
        )
    try:
        return _read(path, "L" if channels == 1 else "RGB", background)
    except Exception as error:  # Pillow's readers raise many kinds, among them OSError, SyntaxError and struct.error
        raise _unreadable(path, error) from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the width and height that :func:`load_image` will give, from the header alone.

    Raises:
        ValueError: if the header cannot be read; the message names the file.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter, perhaps mirrored, too
            return (image.height, image.width) if turned else image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as an image ({error}). Replace or delete it.")


def _read(path: str | os.PathLike[str], mode: str, background: int) -> Image.Image:
    if os.path.getsize(path) == 0:
        raise ValueError("0 bytes")
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
        return _to_mode(ImageOps.exif_transpose(image), mode, background)


def _to_mode(image: Image.Image, mode: str, background: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _sixteen_to_eight_bits(image)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (background, background, background, 255))
        image.alpha_composite(layer)
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    # Older Pillow opens 16-bit files as 32-bit integers ("I"), so the mode alone does not tell the depth.
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no known white point; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257.0).astype(np.uint8))  # 65535 / 257 = 255


def list_images(folder: Path) -> list[str]:
    """Return every image file below a folder, sorted; dot files and dot folders are left out.

    Raises:
        FileNotFoundError: if a file is a symbolic link whose target is gone.
    """
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += list_images(Path(entry.path))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                if entry.is_symlink() and not os.path.exists(entry.path):
                    raise FileNotFoundError(f"{entry.path} is a broken link to {os.readlink(entry.path)}. Repair it.")
                found.append(entry.path)
    return sorted(found)
