"""COCO's mean average precision, the same in one process and in many."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torchmetrics.detection import MeanAveragePrecision as _MeanAveragePrecision

from dia_lightning._coco_tools import coco_backend

_PER_IMAGE = (
    "detection_box",
    "detection_mask",
    "detection_scores",
    "detection_labels",
    "groundtruth_box",
    "groundtruth_mask",
    "groundtruth_labels",
    "groundtruth_crowds",
    "groundtruth_area",
)


class Crowd(NamedTuple):
    """The most objects in an image, without crowds: of one class, and in all."""

    of_a_class: int
    in_all: int


class Scores(NamedTuple):
    """The scores of an evaluation epoch.

    Attributes:
        overall: values in [0, 1] by torchmetrics' names (``map``, ``map_50``, ``mar_100``, ...), those of masks
            prefixed with ``mask_``. Scores that are undefined because there are no such objects are omitted.
        per_class: average precision by label.
        crowd: of the fullest image.
    """

    overall: dict[str, float]
    per_class: dict[int, float]
    crowd: Crowd = Crowd(0, 0)


class MeanAveragePrecision(_MeanAveragePrecision):
    """torchmetrics' ``MeanAveragePrecision``, exact in distributed runs.

    torchmetrics gathers every tensor of every image separately, which hangs as soon as two ranks have different numbers
    of images, and evaluates on every rank. Here each rank sends its data once, rank zero orders the images by index,
    each once, and evaluates, and all ranks get its result.

    Args:
        masks: whether to score masks besides boxes.
        max_detections: how many of the best detections per class count in an image, 100 or more.

    Raises:
        ValueError: if ``max_detections`` is less than 100, or more and faster-coco-eval is not installed.
        ImportError: if neither faster-coco-eval nor pycocotools is installed.
    """

    index: list[Tensor]

    def __init__(self, *, masks: bool, max_detections: int = 100) -> None:
        if max_detections < 100:
            raise ValueError(f"max_detections must be 100, as in COCO, or more, got {max_detections}.")
        if max_detections != 100 and coco_backend() != "faster_coco_eval":  # pycocotools gives -1 as mAP
            raise ValueError(
                f'max_detections={max_detections} needs faster-coco-eval: pip install "dia-lightning[detection]", or '
                "leave it at 100."
            )
        super().__init__(
            iou_type=("bbox", "segm") if masks else "bbox",
            class_metrics=True,
            # pycocotools' own in float64: torchmetrics rounds them to float32, which moves mAP by up to 5e-4
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            max_detection_thresholds=[1, 10, max_detections],
            backend=coco_backend(),
            sync_on_compute=False,
        )
        self.warn_on_many_detections = False  # counting only the best is as in COCO
        self.add_state("index", default=[], dist_reduce_fx=None)

    def add(
        self, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]], index: Tensor
    ) -> None:
        """Add the images of a batch, skipping padding (index -1).

        Args:
            detections: of B images.
            targets: of the same images.
            index: position in the dataset ``[B]``.

        Raises:
            ValueError: if a score or a box is not finite.
        """
        for found, true, position in zip(detections, targets, index.tolist(), strict=True):
            if position < 0:
                continue
            if not (torch.isfinite(found["scores"]).all() and torch.isfinite(found["boxes"]).all()):
                raise ValueError(
                    f"The network returns scores or boxes that are not finite for image {position}: its weights or the "
                    "image are not finite. Use an earlier checkpoint or a lower lr."
                )
            self.update([_prepared(found)], [_prepared(true)])
            self.index.append(torch.tensor(position))

    def compute(self) -> Scores:  # type: ignore[override]
        """Return the scores of all images of all ranks; call it on every rank."""
        own = {int(position): self._record(place) for place, position in enumerate(self.index)}
        if not (distributed.is_available() and distributed.is_initialized()):
            return self._evaluate(own)
        gathered: list[dict[int, Any]] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(gathered, own)
        answer: list[Any] = [None]
        if distributed.get_rank() == 0:
            try:
                answer = [self._evaluate({key: record for part in gathered for key, record in part.items()})]
            except Exception as error:  # otherwise the other ranks would wait forever
                answer = [error]
        distributed.broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        scores: Scores = answer[0]
        return scores

    def _record(self, place: int) -> dict[str, Any]:
        return {name: getattr(self, name)[place] for name in _PER_IMAGE if getattr(self, name)}

    def _evaluate(self, images: dict[int, dict[str, Any]]) -> Scores:
        if not images:
            return Scores({}, {})
        kept = {name: getattr(self, name) for name in _PER_IMAGE}
        ordered = [images[position] for position in sorted(images)]  # ties are broken by the order of images
        try:
            for name in ordered[0]:
                setattr(self, name, [record[name] for record in ordered])
            return Scores(*_scores(super().compute()), _crowd(ordered))
        finally:
            for name, value in kept.items():
                setattr(self, name, value)


def _prepared(item: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of one image on the CPU, with masks as the metric takes them."""
    tensors = {name: value.detach() for name, value in item.items() if isinstance(value, Tensor)}
    for name in {"boxes", "scores"} & set(tensors):
        tensors[name] = tensors[name].float()  # numpy has no bfloat16
    if "masks" in tensors and tensors["masks"].is_floating_point():  # probabilities [N, 1, H, W]
        tensors["masks"] = (tensors["masks"] >= 0.5).squeeze(1)
    return {name: value.cpu() for name, value in tensors.items()}


def _crowd(images: Sequence[Mapping[str, Tensor]]) -> Crowd:
    labels = [image["groundtruth_labels"][image["groundtruth_crowds"] == 0] for image in images]
    of_a_class = [max(Counter(one.tolist()).values(), default=0) for one in labels]
    return Crowd(max(of_a_class), max(map(len, labels)))


def _scores(values: dict[str, Tensor]) -> tuple[dict[str, float], dict[int, float]]:
    both = any(name.startswith("segm_") for name in values)
    overall = {}
    for name, value in values.items():
        if name == "classes" or name.endswith("_per_class") or float(value) < 0:
            continue
        overall[name.replace("bbox_", "").replace("segm_", "mask_")] = float(value)
    precision = values["bbox_map_per_class" if both else "map_per_class"].reshape(-1).tolist()
    labels = values["classes"].reshape(-1).tolist()
    per_class = {int(label): value for label, value in zip(labels, precision, strict=False) if value >= 0}
    return overall, per_class
