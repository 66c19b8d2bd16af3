"""Boxes that no detector can learn from are found when a split is opened, never mid-epoch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.datamodules._annotated_files import Objects

OnBadBox = Literal["drop", "raise"]

_NAMED = 3  # how many a message names
_REASONS = ("NaN or infinite", "no width or height", "outside the image", "less than a pixel inside the image")


def check_boxes(
    objects: Objects,
    *,
    sizes: npt.NDArray[np.int64],
    paths: Sequence[str],
    class_names: Sequence[str],
    where: str,
    on_bad_box: OnBadBox,
) -> Objects:
    """Clip every box to its image, and drop or refuse bad ones.

    A box is bad if a coordinate is NaN or infinite, its width or height is not positive, or less than a pixel of its
    width or height is inside the image. One warning reports the boxes that are dropped, another those that are clipped
    by more than a pixel.

    Args:
        objects: of a split.
        sizes: width and height of every image ``[N, 2]``.
        paths: of every image.
        class_names: name of label i at i - 1.
        where: name of the split in messages.
        on_bad_box: ``"drop"`` or ``"raise"``.

    Raises:
        ValueError: if a box is bad and ``on_bad_box`` is ``"raise"``.
    """
    limits = np.tile(sizes[objects.image], 2)  # width, height, width, height
    clipped = np.clip(objects.boxes, 0, limits)
    reasons = _reasons(objects.boxes, clipped)
    bad = reasons >= 0

    def told(chosen: npt.NDArray[np.bool_], end: str) -> str:
        rows = np.flatnonzero(chosen)
        named = "; ".join(_describe(objects, row, paths, class_names, reasons[row]) for row in rows[:_NAMED])
        more = ", ..." if len(rows) > _NAMED else ""
        return f"{len(rows)} of {len(objects)} boxes in {where} {end}: {named}{more}"

    if bad.any() and on_bad_box == "raise":
        raise ValueError(f"{told(bad, 'are bad')}. Correct them, or set on_bad_box=drop to leave them out.")
    if bad.any():
        rank_zero_warn(told(bad, "are bad and left out"))
    cut = ~bad & (np.abs(clipped - objects.boxes) > 1).any(1)
    if cut.any():
        rank_zero_warn(told(cut, "reach out of their images by more than a pixel and are clipped"))
    return replace(objects, boxes=clipped).rows(np.flatnonzero(~bad))


def _reasons(boxes: npt.NDArray[np.float64], clipped: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    with np.errstate(invalid="ignore"):  # inf - inf
        size, inside = boxes[:, 2:] - boxes[:, :2], clipped[:, 2:] - clipped[:, :2]
    tests = (~np.isfinite(boxes).all(1), (size <= 0).any(1), (inside <= 0).any(1), (inside < 1).any(1))
    return np.select(tests, range(len(tests)), default=-1)


def _describe(objects: Objects, row: int, paths: Sequence[str], class_names: Sequence[str], reason: int) -> str:
    box = ", ".join(f"{value:g}" for value in objects.boxes[row])
    what = f"{objects.id_name} {objects.ids[row]}, {class_names[objects.labels[row] - 1]}"
    why = f", {_REASONS[reason]}" if reason >= 0 else ""
    return f"{paths[objects.image[row]]} ({what}, box {box}{why})"
