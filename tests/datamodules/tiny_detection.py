"""Writers of tiny detection data sets in the on-disk format of the real ones."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dia_lightning.datamodules import CocoDetectionDataModule
from tests.datamodules.tiny_data import pixels

CATEGORIES = {3: "disc", 7: "square", 20: "bar"}
"""Ids with gaps; labels are 1, 2 and 3."""

BCCD_LAYOUT = {
    **{f"{split}_annotations": f"instances_{split}.json" for split in ("train", "val", "test")},
    **{f"{split}_images": "images" for split in ("train", "val", "test")},
}
"""Options of CocoDetectionDataModule for what write_coco writes."""


def write_coco(root: Path, *, train: int = 6, val: int = 3, test: int = 3, masks: bool = False) -> None:
    """Write ``images/`` and ``instances_{train,val,test}.json`` with coloured rectangles on grey noise.

    The i-th image of a split has i % 4 objects of the classes disc, square and bar, and a size of its own.
    """
    (root / "images").mkdir(parents=True)
    for number, (split, count) in enumerate({"train": train, "val": val, "test": test}.items()):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            image_id = 100 * (number + 1) + i
            width, height, boxes = 60 + 4 * i, 50 + 2 * i, _boxes(i % 4)
            images.append({"id": image_id, "file_name": f"{split}_{i}.png", "width": width, "height": height})
            colours = _draw(root / "images" / f"{split}_{i}.png", width, height, boxes)
            for box, category in zip(boxes, colours, strict=True):
                annotations.append(_annotation(len(annotations) + 1, image_id, category, box, masks))
        categories = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"instances_{split}.json").write_text(json.dumps(content))


def coco_object(number: int, image: int, **values: Any) -> dict[str, Any]:
    """Return an annotation of a disc, with other values if given."""
    return {"id": number, "image_id": image, "category_id": 3, "bbox": [1, 2, 10, 10], "area": 100, **values}


def write_voc(root: Path, year: str = "2012", *, names: tuple[str, ...] = ("cat", "dog", "person")) -> Path:
    """Write ``VOCdevkit/VOC{year}`` with 4 training, 2 validation and (2007) 2 test images. Return that folder."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    splits = {"train": 4, "val": 2, "test": 2} if year == "2007" else {"train": 4, "val": 2}
    for split, count in splits.items():
        stems = [f"{split}_{i}" for i in range(count)]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for i, stem in enumerate(stems):
            boxes = _boxes(i % 4)
            _draw(folder / "JPEGImages" / f"{stem}.jpg", 64, 48, boxes)
            objects = "".join(voc_object(names[k % 3], box, difficult=k == 1) for k, box in enumerate(boxes))
            write_voc_xml(folder / "Annotations" / f"{stem}.xml", objects)
    return folder


def voc_object(name: str, box: tuple[int, int, int, int], *, difficult: bool = False) -> str:
    """Return the XML of an object; the box is x, y, width, height counted from 0."""
    x, y, width, height = box
    edges = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax>"
    return f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>{edges}</bndbox></object>"


def write_voc_xml(path: Path, objects: str, *, size: str = "<width>64</width><height>48</height>") -> None:
    """Write the annotation of one image."""
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename><size>{size}</size>{objects}</annotation>")


@contextmanager
def edit_json(path: Path) -> Iterator[dict[str, Any]]:
    """Give the content of a json file to change, and write it back."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def coco_data(root: Path, **options: Any) -> CocoDetectionDataModule:
    """Return the data module of what write_coco writes, without augmentation and workers."""
    settings: dict[str, Any] = {"augment": "none", "batch_size": 2, "num_workers": 0, "pin_memory": False}
    return CocoDetectionDataModule(root=str(root), **{**BCCD_LAYOUT, **settings, **options})


def _boxes(count: int) -> list[tuple[int, int, int, int]]:
    return [(4 + 16 * k, 6 + 5 * k, 12 + k, 10 + 2 * k) for k in range(count)]


def _draw(path: Path, width: int, height: int, boxes: list[tuple[int, int, int, int]]) -> list[int]:
    image = pixels(height, width, 3, seed=width) // 4 + 96
    categories = [list(CATEGORIES)[k % 3] for k in range(len(boxes))]
    for (x, y, w, h), category in zip(boxes, categories, strict=True):
        image[y : y + h, x : x + w] = np.eye(3, dtype=np.uint8)[list(CATEGORIES).index(category)] * 220
    Image.fromarray(image).save(path)
    return categories


def _annotation(number: int, image: int, category: int, box: tuple[int, int, int, int], masks: bool) -> dict[str, Any]:
    x, y, w, h = box
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": w * h, "iscrowd": 0}
    return entry | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]} if masks else entry
