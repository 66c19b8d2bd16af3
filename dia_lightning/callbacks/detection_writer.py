"""Detections as a COCO results file, and pictures of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dia_lightning._coco_tools import mask_tools
from dia_lightning.callbacks._class_names import object_classes
from dia_lightning.callbacks._result_writer import ResultWriter, in_order, sample_name, sample_owner, whole_text
from dia_lightning.callbacks._step_outputs import detected_objects, read_detections
from dia_lightning.callbacks.pictures import write_picture
from dia_lightning.drawing import ObjectClasses, Objects, draw_objects


class DetectionWriter(ResultWriter):
    """Write the detections of ``test`` and ``predict`` to a COCO results file in the run folder.

    ``detections.json`` is a list of ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}``, with masks
    also ``"segmentation"`` (compressed run lengths of the pixels of probability 0.5 and more), sorted by the sample's
    index. Ids are those of the user's files where there are any; else images are numbered from 1 in the order of the
    samples, and categories are the labels. ``detections.images.json`` beside it names images and categories, so that
    ``COCO("detections.images.json").loadRes("detections.json")`` of pycocotools reads both. To score masks with it,
    leave ``"bbox"`` out of the entries first: pycocotools would sort masks into sizes by the area of their boxes.

    In ``predict`` each image is also drawn with its detections, in its own size:
    ``pictures/predict/detections/<index>_<file>.png``.

    Padding samples (index -1) are left out, and a sample that several ranks have seen is written once. An interrupted
    run leaves its part files, one JSON object per image and line. No file is ever overwritten: as with checkpoints, the
    second file in a folder is called ``detections-v1.json``. A run over several machines needs a shared disk.

    The steps must return ``{"index": [B], "detections": list of B dicts}`` as torchvision's detectors give them.

    Args:
        filename: name of the file in the run folder, ending in ``.json``.
        score_threshold: write detections from this score on, 0 to 1. COCO's metric needs those of low scores too.
        overlays: whether to draw the images of ``predict``.
        overlay_threshold: draw detections from this score on, 0 to 1.

    Attributes:
        path: the file of the last run, on every rank; ``None`` before.

    Raises:
        ValueError: if an argument is out of range, a step returns something else, or a detection is not finite.

    Example:
        >>> DetectionWriter(overlays=False).path is None
        True
        >>> DetectionWriter(filename="results/all.json")
        Traceback (most recent call last):
        ...
        ValueError: filename must be a plain name that ends in '.json', got 'results/all.json'. Use 'detections.json'.
    """

    kind = "detections"
    _suffix = ".json"
    _part_suffix = ".jsonl"

    def __init__(
        self,
        *,
        filename: str = "detections.json",
        score_threshold: float = 0.0,
        overlays: bool = True,
        overlay_threshold: float = 0.5,
    ) -> None:
        super().__init__(filename=filename)
        for name, value in (("score_threshold", score_threshold), ("overlay_threshold", overlay_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}. Scores are probabilities.")
        self.score_threshold = score_threshold
        self.overlays = overlays
        self.overlay_threshold = overlay_threshold
        self._classes = ObjectClasses(None, None)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._classes = object_classes(trainer, pl_module)
        if getattr(getattr(trainer, "datamodule", None), "predict_folder", None) is not None and trainer.testing:
            rank_zero_warn(
                "Image ids of the test set are not known while predict_folder is set, so images are numbered from 1. "
                "Test without predict_folder."
            )

    def _write(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, part: TextIO) -> None:
        found = read_detections(outputs)
        for row, index, detections in zip(found.rows, found.indices, found.detections, strict=True):
            image, name = batch[0][row], sample_name(trainer, index)
            _check_finite(detections, index, name)
            entry = _image_entry(_image_id(trainer, index), name, image)
            objects = detected_objects(detections, self.score_threshold)
            written = list(_entries(objects, entry["id"], self._classes))
            part.write(json.dumps({"index": index, "image": entry, "detections": written}, allow_nan=False) + "\n")
            if self.overlays and not trainer.testing:
                shown = detected_objects(detections, self.overlay_threshold)
                picture = draw_objects(image.detach().float().cpu(), shown, self._classes)
                # files of one name differ by the index; a long name would not fit beside it
                path = _overlay_folder(self._target) / f"{index:06d}_{Path(name).stem[:60]}.png"
                write_picture(picture, path, str(path))

    def _places(self, target: Path) -> list[Path]:
        return [*super()._places(target), _images_file(target), _overlay_folder(target)]

    def _merge(self, parts: list[Path], target: Path) -> None:
        """Copy image by image, because all detections together can be larger than the memory."""
        lines = in_order(map(_lines, parts), target)
        images: dict[int, dict[str, Any]] = {}
        categories = self._classes.category_names
        with whole_text(target) as file:
            separator = "["
            for part, position in lines:
                record = _record_at(part, position)
                images[record["image"]["id"]] = record["image"]
                for detection in record["detections"]:
                    categories.setdefault(detection["category_id"], str(detection["category_id"]))
                    file.write(f"{separator}\n{json.dumps(detection)}")
                    separator = ","
            file.write("[]\n" if separator == "[" else "\n]\n")
        named = [{"id": category_id, "name": name} for category_id, name in categories.items()]
        with whole_text(_images_file(target)) as file:
            json.dump({"images": list(images.values()), "annotations": [], "categories": named}, file, indent=1)


def _images_file(target: Path) -> Path:
    return target.with_name(f"{target.stem}.images.json")


def _overlay_folder(target: Path) -> Path:
    return target.parent / "pictures" / "predict" / target.stem


def _image_id(trainer: Trainer, index: int) -> int:
    """Return the id of an image in the user's file, or its number from 1."""
    image_id = getattr(sample_owner(trainer), "image_id", None)
    return index + 1 if image_id is None else int(image_id(index))


def _image_entry(image_id: int, name: str, image: Tensor) -> dict[str, Any]:
    height, width = image.shape[-2:]
    return {"id": image_id, "file_name": name, "width": width, "height": height}


def _check_finite(detections: Any, index: int, name: str) -> None:
    finite = torch.isfinite(detections["scores"]) & torch.isfinite(detections["boxes"]).all(dim=1)
    if "masks" in detections:
        finite &= torch.isfinite(detections["masks"]).flatten(1).all(dim=1)
    if not finite.all():
        i = int((~finite).nonzero()[0])
        raise ValueError(
            f"Sample {index} ({name}) has a detection that is not finite: box {detections['boxes'][i].tolist()}, "
            f"score {float(detections['scores'][i])}. Use a checkpoint whose weights are finite, or precision 32."
        )


def _entries(objects: Objects, image_id: int, classes: ObjectClasses) -> Iterator[dict[str, Any]]:
    """Yield the detections of one image as COCO's results format has them."""
    assert objects.scores is not None
    rows = zip(objects.boxes.tolist(), objects.labels.tolist(), objects.scores.tolist(), strict=True)
    for i, ((left, top, right, bottom), label, score) in enumerate(rows):
        entry = {
            "image_id": image_id,
            "category_id": classes.category_id(label),
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        if objects.masks is not None:
            entry["segmentation"] = _run_lengths(objects.masks[i])
        yield entry


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    """Return a mask ``[H, W]`` in COCO's compressed form, as text."""
    encoded = mask_tools().encode(np.asfortranarray(mask.byte().numpy()))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _lines(part: Path) -> Iterator[tuple[int, tuple[Path, int]]]:
    """Yield the index of every line of a part, and where the line is."""
    position = 0
    with part.open("rb") as file:
        for line in file:
            yield json.loads(line)["index"], (part, position)
            position += len(line)


def _record_at(part: Path, position: int) -> dict[str, Any]:
    with part.open("rb") as file:
        file.seek(position)
        record: dict[str, Any] = json.loads(file.readline())
        return record
