"""Areas of annotations, which only sort results by size: impossible ones are not used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.datamodules._annotated_files import Objects
from dia_lightning.datamodules._split_warnings import named

_ROUNDING = 2  # pixels by which boxes may be too small
_SLACK = 1.5
_LEAST_BOX = 16  # pixels; thinner objects may have masks of less than a pixel


def plausible_areas(objects: Objects, path: Path) -> Objects:
    """Replace impossible areas with the area of the mask or box, with a warning.

    An area is impossible if it is larger than its box, or less than a pixel in a box of many pixels. All are if they
    are equal but the boxes are not.

    Args:
        objects: of a split.
        path: of the annotation file, for the message.
    """
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    with np.errstate(invalid="ignore", over="ignore"):
        boxes = sides.prod(1)
        given = ~np.isnan(objects.area) & np.isfinite(boxes) & (sides > 0).all(1)
        largest = _SLACK * (sides + _ROUNDING).prod(1)
        wrong = given & ((objects.area > largest) | ((objects.area < 1) & (boxes >= _LEAST_BOX)))
    if _constant(objects.area[given], boxes[given]):
        wrong = given
    if not wrong.any():
        return objects
    rows = np.flatnonzero(wrong)
    examples = [f"{objects.ids[row]} with {objects.area[row]:g} for a box of {boxes[row]:g}" for row in rows[:4]]
    rank_zero_warn(
        f"{len(rows)} of {len(objects)} annotations of {path} have an area that cannot be true (annotation "
        f"{named(examples)}): that of the mask or box is used, which map_small, map_medium and map_large depend on."
    )
    return replace(objects, area=np.where(wrong, np.nan, objects.area))


def _constant(areas: npt.NDArray[np.float64], boxes: npt.NDArray[np.float64]) -> bool:
    return len(areas) > 2 and bool(areas.min() == areas.max() and boxes.max() > 2 * boxes.min())
