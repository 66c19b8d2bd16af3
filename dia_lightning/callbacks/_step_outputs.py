"""What the callbacks read from the outputs of a step, and from the targets of a detector."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dia_lightning.drawing import Objects

MASK_THRESHOLD = 0.5  # probability from which a pixel belongs to an object


class StepOutputs(NamedTuple):
    """Predictions of one batch without its padding samples.

    Attributes:
        rows: positions in the batch that are no padding, ``[N]``.
        indices: positions in the dataset, ``[N]``.
        probabilities: class probabilities in float32, ``[N, K]``.
    """

    rows: Tensor
    indices: Tensor
    probabilities: Tensor


def read_step_outputs(outputs: Any) -> StepOutputs:
    """Return the predictions of one batch on the CPU, padding samples (index -1) left out.

    Raises:
        ValueError: if the step did not return ``index [B]`` and ``probabilities [B, K]``.

    Example:
        >>> outputs = {"index": torch.tensor([4, -1]), "probabilities": torch.tensor([[0.25, 0.75], [0.5, 0.5]])}
        >>> read_step_outputs(outputs).indices.tolist()
        [4]
    """
    _check_keys(outputs, {"index": "LongTensor[B]", "probabilities": "Tensor[B, K]"})
    index = outputs["index"].detach().cpu()
    probabilities = outputs["probabilities"].detach().float().cpu()
    if index.ndim != 1 or probabilities.ndim != 2 or len(index) != len(probabilities):
        raise ValueError(
            f"index must be [B] and probabilities [B, K], but they are {list(index.shape)} and "
            f"{list(probabilities.shape)}. Return one index and one row of probabilities per sample."
        )
    rows = torch.nonzero(index >= 0).flatten()
    return StepOutputs(rows, index[rows], probabilities[rows])


class StepDetections(NamedTuple):
    """Detections of one batch without its padding samples, on the device that the step left them on.

    Attributes:
        rows: positions in the batch that are no padding.
        indices: positions in the dataset.
        detections: ``boxes [N, 4]``, ``labels [N]``, ``scores [N]`` and perhaps ``masks [N, 1, H, W]`` per image.
    """

    rows: list[int]
    indices: list[int]
    detections: list[Mapping[str, Tensor]]


def read_detections(outputs: Any) -> StepDetections:
    """Return the detections of one batch, padding samples (index -1) left out.

    Raises:
        ValueError: if the step did not return ``index [B]`` and ``detections``, one dict per image.

    Example:
        >>> nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
        >>> read_detections({"index": torch.tensor([4, -1]), "detections": [nothing, nothing]}).indices
        [4]
    """
    _check_keys(outputs, {"index": "LongTensor[B]", "detections": "list of B dicts"})
    index, detections = outputs["index"].tolist(), list(outputs["detections"])
    if len(index) != len(detections):
        raise ValueError(
            f"There are {len(index)} indices, but detections of {len(detections)} images. "
            "Return one index and one dict of detections per image."
        )
    for found in detections:
        _check_detections(found)
    rows = [row for row, sample in enumerate(index) if sample >= 0]
    return StepDetections(rows, [index[row] for row in rows], [detections[row] for row in rows])


def true_objects(target: Mapping[str, Tensor]) -> Objects:
    """Return the objects of a target."""
    masks, crowd = target.get("masks"), target.get("iscrowd")
    return Objects(
        boxes=target["boxes"].detach().float().cpu(),
        labels=target["labels"].detach().cpu(),
        masks=None if masks is None else masks.detach().bool().cpu(),
        crowd=None if crowd is None else crowd.detach().bool().cpu(),
    )


def detected_objects(detections: Mapping[str, Tensor], score_threshold: float) -> Objects:
    """Return the detections of an image from a score on; their masks are the pixels of probability 0.5 and more."""
    chosen = detections["scores"] >= score_threshold
    masks = detections.get("masks")
    return Objects(
        boxes=detections["boxes"][chosen].detach().float().cpu(),
        labels=detections["labels"][chosen].detach().cpu(),
        scores=detections["scores"][chosen].detach().float().cpu(),
        masks=None if masks is None else (masks[:, 0] >= MASK_THRESHOLD)[chosen].cpu(),
    )


def _check_keys(outputs: Any, wanted: dict[str, str]) -> None:
    if not isinstance(outputs, Mapping) or not set(wanted) <= set(outputs):
        found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        contract = ", ".join(f"{key!r}: {value}" for key, value in wanted.items())
        raise ValueError(
            f"The step must return {{{contract}}} for this callback, but returned {found}. "
            "Return both from validation_step, test_step and predict_step."
        )


def _check_detections(found: Any) -> None:
    shapes = {key: list(value.shape) for key, value in found.items()} if isinstance(found, Mapping) else {}
    count = shapes.get("scores", [0])[:1]
    wanted = {"boxes": [*count, 4], "labels": count, "scores": count}
    if "masks" in shapes:
        wanted["masks"] = [*count, 1, *shapes["masks"][2:]]
    if any(shapes.get(key) != shape for key, shape in wanted.items()):
        raise ValueError(
            "The detections of an image must be boxes [N, 4], labels [N], scores [N] and perhaps masks [N, 1, H, W], "
            f"but are {shapes or type(found).__name__}. Return them as torchvision's detectors do."
        )
