"""Masks of COCO's annotations: polygons, and run lengths with or without compression."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dia_lightning._coco_tools import mask_tools
from dia_lightning.datamodules._annotated_files import Segmentation

_FARTHEST = 1e6  # pixels; the C code that fills polygons computes with 32-bit integers


def segmentation_fault(segmentation: Any, size: Sequence[int] | npt.NDArray[np.int64]) -> str | None:
    """Return what is wrong with the segmentation of an annotation.

    Args:
        segmentation: as in the file, ``None`` if it is missing.
        size: width and height of the image, 0 if unknown.

    Returns:
        A phrase for a message; ``None`` if nothing is wrong.
    """
    if not segmentation:
        return "has no segmentation, but masks=True needs one. Set masks=False, or leave the annotation out"
    if isinstance(segmentation, list):
        if all(_is_polygon(polygon) for polygon in segmentation):
            return None
        return "has a segmentation that is not a list of polygons, each [x1, y1, x2, y2, x3, y3, ...]"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        return "has a segmentation that is neither a list of polygons nor run lengths with size and counts"
    width, height = (int(side) for side in size)
    counts, own = segmentation["counts"], segmentation["size"]
    if not isinstance(own, list) or [type(side) for side in own] != [int, int]:
        return f"has run lengths of size {own!r}, expected [height, width]"
    if width and height and own != [height, width]:
        return f"has run lengths of size {own}, but the image has {[height, width]} (height, width)"
    if isinstance(counts, list) and any(type(count) is not int or count < 0 for count in counts):
        return "has run lengths that are not whole numbers of 0 or more"
    if isinstance(counts, list) and sum(counts) != own[0] * own[1]:
        return f"has run lengths for {sum(counts)} pixels, but its size is {own} (height, width)"
    return None if isinstance(counts, list | str) else f"has run lengths of type {type(counts).__name__}"


def decode_masks(segmentations: Sequence[Segmentation], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return the masks ``[N, H, W]`` of N segmentations of one image, 1 inside and 0 outside."""
    masks = np.zeros((len(segmentations), height, width), dtype=np.uint8)
    tools = mask_tools()
    for mask, segmentation in zip(masks, segmentations, strict=True):
        if isinstance(segmentation, list):
            mask[:] = tools.decode(tools.frPyObjects(segmentation, height, width)).any(2)
        elif isinstance(segmentation["counts"], list):
            mask[:] = tools.decode(tools.frPyObjects(segmentation, height, width))
        else:
            mask[:] = tools.decode(segmentation)
    return masks


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 == 1:
        return False
    return all(type(value) in (int, float) and abs(value) < _FARTHEST for value in polygon)
