"""The annotated objects of a split as columns, and image files with their objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dia_lightning.datamodules.sources import FileSource

Segmentation = Any
"""A mask in COCO's format: polygons, or a dict with run lengths."""


@dataclass(frozen=True)
class Objects:
    """All objects of a split, one row each; stored as columns, which loader workers share without copying.

    Args:
        image: position of the image of each object ``[M]``.
        boxes: x1, y1, x2, y2 in pixels ``[M, 4]`` float64.
        labels: 1 to K ``[M]``.
        iscrowd: 1 for objects that are neither hits nor misses, else 0 ``[M]``.
        area: in pixels ``[M]``; NaN for the area of the mask, or of the box if there is none.
        ids: identifies each object for the user ``[M]``, see ``id_name``.
        id_name: what ``ids`` are, such as ``"annotation"``.
        segmentations: one per object, or ``None`` if masks are not wanted; lists, which workers do copy.
    """

    image: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.int64]
    area: npt.NDArray[np.float64]
    ids: npt.NDArray[np.int64]
    id_name: str
    segmentations: list[Segmentation] | None = None

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, chosen: npt.NDArray[np.int64]) -> "Objects":
        """Return the objects at some positions, in that order."""
        columns = {name: getattr(self, name)[chosen] for name in ("image", "boxes", "labels", "iscrowd", "area", "ids")}
        kept = None if self.segmentations is None else [self.segmentations[row] for row in chosen]
        return replace(self, **columns, segmentations=kept)


class AnnotatedFiles(FileSource):
    """Image files with objects.

    Args:
        paths: the files.
        sizes: width and height of every file according to the annotations ``[N, 2]``.
        objects: good objects only, see :func:`check_boxes`.
        image_ids: id of every image in the user's annotation file; ``None`` means position + 1.
        decode: turns n segmentations, height and width into masks ``[n, H, W]`` uint8; needed if there are any.
        bit_depth: how many bits 16-bit files use, see :func:`load_image`.
        inodes: a number per file that two names of the same file share; ``None`` if unknown.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        sizes: npt.NDArray[np.int64],
        objects: Objects,
        image_ids: Sequence[int] | None = None,
        decode: Callable[[list[Segmentation], int, int], npt.NDArray[np.uint8]] | None = None,
        bit_depth: int = 16,
        inodes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(paths, channels=3, bit_depth=bit_depth, inodes=inodes)
        self._sizes = sizes
        self._objects = objects.rows(np.argsort(objects.image, kind="stable"))
        self._starts = np.searchsorted(self._objects.image, np.arange(len(paths) + 1))
        self._image_ids = image_ids
        self._decode = decode

    def image(self, position: int) -> Image.Image:
        """Read one file and compare its size with the annotations."""
        image = super().image(position)
        width, height = self._sizes[position]
        if image.size != (width, height):
            raise ValueError(
                f"the image has {image.width} x {image.height} pixels, but its annotations say {width} x {height}, so "
                "its boxes cannot be trusted"
            )
        return image

    def target(self, position: int) -> dict[str, Tensor]:
        """Return the objects of one image: boxes, labels, iscrowd, area, and masks if there are any."""
        objects = self._objects.rows(np.arange(self._starts[position], self._starts[position + 1]))
        boxes = objects.boxes
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        target: dict[str, Tensor] = {}
        if objects.segmentations is not None and self._decode is not None:
            width, height = self._sizes[position]
            masks = self._decode(objects.segmentations, int(height), int(width))
            area = masks.sum((1, 2), dtype=np.float64)
            target["masks"] = torch.from_numpy(masks)
        return target | {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": torch.from_numpy(objects.labels),
            "iscrowd": torch.from_numpy(objects.iscrowd),
            "area": torch.from_numpy(np.where(np.isnan(objects.area), area, objects.area).astype(np.float32)),
        }

    def classes_in(self, positions: npt.NDArray[np.int64]) -> set[int]:
        """Return the labels of the objects in some images, without those that do not count (``iscrowd``)."""
        here = np.isin(self._objects.image, positions) & (self._objects.iscrowd == 0)
        return set(np.unique(self._objects.labels[here]).tolist())

    def image_id(self, position: int) -> int:
        """Return the id of an image in the user's annotation file."""
        return position + 1 if self._image_ids is None else self._image_ids[position]
