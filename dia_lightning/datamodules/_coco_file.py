"""Read annotation files in COCO's format, and check everything in them before training."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.datamodules._annotated_files import Objects
from dia_lightning.datamodules._coco_masks import segmentation_fault

_Entry = dict[str, Any]


@dataclass(frozen=True)
class CocoFile:
    """The contents of an annotation file.

    Args:
        path: the file.
        categories: name of every category by its id, sorted by id.
        image_ids: of every image.
        file_names: of every image, relative to the folder of images.
        sizes: width and height of every image ``[N, 2]``, 0 where the file does not give them.
        objects: all annotations; label i is the i-th category.
    """

    path: Path
    categories: dict[int, str]
    image_ids: list[int]
    file_names: list[str]
    sizes: npt.NDArray[np.int64]
    objects: Objects


def read_coco(path: Path, *, masks: bool) -> CocoFile:
    """Read an annotation file.

    Args:
        path: an existing file.
        masks: whether to keep segmentations; then every annotation must have one.

    Raises:
        ValueError: if it is not in COCO's format or is inconsistent; the message names the file and the value.
    """
    content = _parse(path)
    categories = _categories(path, content["categories"])
    images: list[_Entry] = content["images"]
    image_ids = _ids(path, "image", images)
    for image in images:
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise _fault(path, "image", image, "has no file_name")
    sizes = np.array([[_side(image.get("width")), _side(image.get("height"))] for image in images])
    return CocoFile(
        path=path,
        categories=categories,
        image_ids=image_ids,
        file_names=[image["file_name"] for image in images],
        sizes=sizes,
        objects=_objects(path, content["annotations"], categories, image_ids, sizes, masks=masks),
    )


def _parse(path: Path) -> dict[str, list[_Entry]]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Fetch or write it again.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} must hold an object with images, annotations and categories, got a value of {kind}.")
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} has no list {key!r} of objects, as COCO's format wants it.")
        if not entries and key != "annotations":  # images without any object are data too
            raise ValueError(f"{path} has an empty list {key!r}, so there is nothing to load.")
    return content


def _categories(path: Path, entries: list[_Entry]) -> dict[int, str]:
    ids = _ids(path, "category", entries)
    categories: dict[int, str] = {}
    for number, entry in zip(ids, entries, strict=True):
        name = entry.get("name")
        if not isinstance(name, str) or name in categories.values():
            raise _fault(path, "category", entry, f"has the name {name!r}, expected a text that no other category has")
        categories[number] = name
    return dict(sorted(categories.items()))


def _ids(path: Path, kind: str, entries: Iterable[_Entry]) -> list[int]:
    seen: dict[int, None] = {}
    for entry in entries:
        number = _whole(entry.get("id"))
        if number is None:
            raise ValueError(f"{path} has the {kind} id {entry.get('id')!r}, expected a whole number.")
        if number in seen:
            raise ValueError(f"{path} has the {kind} id {number} more than once. Number them anew.")
        seen[number] = None
    return list(seen)


def _whole(value: Any) -> int | None:
    """Return a whole number, even if a table or script wrote it as ``1.0``, ``"1"`` or ``true``; else ``None``."""
    if type(value) is int:
        return value
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    return int(value) if isinstance(value, int | float) and isfinite(value) and value == int(value) else None


def _side(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and value >= 1 and value == int(value) else 0


def _objects(
    path: Path,
    annotations: list[_Entry],
    categories: dict[int, str],
    image_ids: list[int],
    sizes: npt.NDArray[np.int64],
    *,
    masks: bool,
) -> Objects:
    labels: dict[int | None, int] = {category: label for label, category in enumerate(categories, start=1)}
    positions: dict[int | None, int] = {image: position for position, image in enumerate(image_ids)}
    annotations = _of_known_images(path, annotations, positions)
    images = [positions[_whole(annotation["image_id"])] for annotation in annotations]
    for annotation, image in zip(annotations, images, strict=True):
        fault = _annotation_fault(annotation, labels)
        if fault is None and masks:
            fault = segmentation_fault(annotation.get("segmentation"), sizes[image])
        if fault is not None:
            raise _fault(path, "annotation", annotation, fault)
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    return Objects(
        image=np.array(images, dtype=np.int64),
        boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),  # from x, y, width, height
        labels=np.array([labels[_whole(annotation["category_id"])] for annotation in annotations], dtype=np.int64),
        iscrowd=np.array([_whole(annotation.get("iscrowd") or 0) for annotation in annotations], dtype=np.int64),
        area=np.array([_area(annotation.get("area")) for annotation in annotations], dtype=np.float64),
        ids=np.array(_ids(path, "annotation", annotations), dtype=np.int64),
        id_name="annotation",
        segmentations=[annotation["segmentation"] for annotation in annotations] if masks else None,
    )


def _of_known_images(path: Path, annotations: list[_Entry], positions: dict[int | None, int]) -> list[_Entry]:
    """Drop the annotations of images that are not in the file, as in a shortened list."""
    for annotation in annotations:
        if _whole(annotation.get("image_id")) is None:
            fault = f"is for image_id {annotation.get('image_id')!r}, expected a whole number"
            raise _fault(path, "annotation", annotation, fault)
    known = [annotation for annotation in annotations if _whole(annotation["image_id"]) in positions]
    if len(known) == len(annotations):
        return known
    other = next(annotation for annotation in annotations if _whole(annotation["image_id"]) not in positions)
    told = (
        f"{len(annotations) - len(known)} of {len(annotations)} annotations of {path} are for images that are not in "
        f"it, such as annotation {other.get('id')!r} for image_id {other['image_id']!r}"
    )
    if not known:
        raise ValueError(f"{told}, so nothing is left. Do its images have other ids?")
    rank_zero_warn(f"{told}; they are left out.")
    return known


def _annotation_fault(annotation: _Entry, labels: dict[int | None, int]) -> str | None:
    category, box, crowd = (annotation.get(key) for key in ("category_id", "bbox", "iscrowd"))
    if _whole(category) not in labels:
        return f"has category_id {category!r}, which is not in categories"
    if not isinstance(box, list) or len(box) != 4 or any(type(value) not in (int, float) for value in box):
        return f"has bbox {box!r}, expected [x, y, width, height]"
    if _whole(crowd or 0) not in (0, 1):
        return f"has iscrowd {crowd!r}, expected 0 or 1"
    return None


def _area(value: Any) -> float:
    return float(value) if type(value) in (int, float) and 0 <= value < float("inf") else float("nan")


def _fault(path: Path, kind: str, entry: _Entry, fault: str) -> ValueError:
    return ValueError(f"{path}: {kind} {entry.get('id')!r} {fault}.")
