"""Where pixels come from: arrays in memory, or image files."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from dia_lightning.datamodules._images import load_image


class Source(Protocol):
    """A labelled set of images, addressed by position. It must be picklable, because loader workers get a copy."""

    labels: npt.NDArray[np.int64]

    def image(self, position: int) -> Image.Image:
        """Return one image as 8-bit ``L`` or ``RGB``."""

    def name(self, position: int) -> str:
        """Return a name to find the image by: a path, or ``"split/position"``."""


class ArraySource:
    """Images in memory.

    Args:
        images: their 8-bit pixels, ``[N, H, W]`` or ``[N, H, W, 3]``.
        labels: one class index per image.
        split: first part of the names, such as ``"test"``.
        channels: 1 gives grey images, 3 gives RGB images, regardless of the array.
    """

    def __init__(
        self, images: npt.NDArray[np.uint8], labels: Sequence[int] | npt.NDArray[Any], *, split: str, channels: int
    ) -> None:
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self._split = split
        self._mode = "L" if channels == 1 else "RGB"

    def image(self, position: int) -> Image.Image:
        """Return one image of mode ``L`` or ``RGB``."""
        image = Image.fromarray(self.images[position])
        return image if image.mode == self._mode else image.convert(self._mode)

    def name(self, position: int) -> str:
        """Return ``"split/position"``."""
        return f"{self._split}/{position}"


class FileSource:
    """Image files.

    Args:
        paths: the files.
        labels: one class index per file; ``None`` if there are no labels (all are 0 then).
        channels: 1 gives grey images, 3 gives RGB images, regardless of the files.
        bit_depth: how many bits 16-bit files use, see :func:`load_image`.
        inodes: a number per file that two names of the same file share; ``None`` if unknown.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None = None,
        *,
        channels: int,
        bit_depth: int = 16,
        inodes: Sequence[int] | None = None,
    ) -> None:
        self.paths = list(paths)
        self.inodes = None if inodes is None else np.array(inodes, dtype=np.int64)
        self.bit_depth = bit_depth
        self.labels = np.zeros(len(paths), dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        self._channels = channels

    def image(self, position: int) -> Image.Image:
        """Read one file; see :func:`load_image` for what is converted and what is refused."""
        return load_image(self.paths[position], channels=self._channels, bit_depth=self.bit_depth)

    def name(self, position: int) -> str:
        """Return the path."""
        return self.paths[position]
