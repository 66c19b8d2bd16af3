"""Detectors of a few thousand weights and images with coloured rectangles."""

from typing import Any

import torch
from torch import Tensor

from dia_lightning.tasks.detection import DetectionTask

Batch = tuple[list[Tensor], list[dict[str, Tensor]], Tensor]

BACKBONE: dict[str, Any] = {"depth": 8, "block": "basic", "stem_stride": 4}


def tiny_options(detector: str, **options: Any) -> dict[str, Any]:
    """Arguments of a detector that make it small, and let it find something before it is trained."""
    small: dict[str, Any] = {"min_size": 64, "max_size": 96, "fpn_channels": 32 if detector == "fcos" else 16}
    if detector in ("fasterrcnn", "maskrcnn"):
        small.update(representation_size=32, box_detections_per_img=10, rpn_post_nms_top_n_train=50)
    elif detector == "ssdlite":
        small = {"score_thresh": 0.0, "detections_per_img": 10}
    else:
        small.update(score_thresh=0.0, detections_per_img=100)
    return {**small, **options}


def tiny_task(detector: str = "fasterrcnn", **options: Any) -> DetectionTask:
    """A task for objects of three classes; the same seed gives the same weights."""
    torch.manual_seed(options.pop("seed", 0))
    arguments: dict[str, Any] = {
        "backbone": "cifar_resnet",
        "num_classes": 3,
        "backbone_args": BACKBONE,
        "attention": "dia-lstm",
        "lr": 0.01,
        **options,
        "detector_args": tiny_options(detector, **options.get("detector_args", {})),
    }
    return DetectionTask(detector, **arguments)  # type: ignore[arg-type]


def tiny_batch(*counts: int, seed: int = 0, masks: bool = False, wide: bool = True) -> Batch:
    """Images with as many rectangles each, targets as for evaluation, and positions 0, 1, ...

    Args:
        counts: objects of each image.
        seed: of the noise and the rectangles.
        masks: whether targets have masks.
        wide: whether every second image is wider than it is high.
    """
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for number, count in enumerate(counts):
        image = torch.rand(3, 64, 80 if wide and number % 2 else 64, generator=generator) / 2
        corners = torch.randint(2, 30, (count, 2), generator=generator).float()
        sides = torch.randint(12, 32, (count, 2), generator=generator).float()
        labels = torch.randint(1, 4, (count,), generator=generator)
        filled = torch.zeros(count, *image.shape[1:], dtype=torch.uint8)
        for mask, label, (left, top), (width, height) in zip(
            filled, labels, corners.int().tolist(), sides.int().tolist(), strict=True
        ):
            mask[top : top + height, left : left + width] = 1
            image[int(label) - 1][mask.bool()] = 1.0
        target = {"boxes": torch.cat([corners, corners + sides], 1), "labels": labels}
        target.update(iscrowd=torch.zeros(count, dtype=torch.int64), area=sides.prod(1))
        images.append(image)
        targets.append({**target, "masks": filled} if masks else target)
    return images, targets, torch.arange(len(counts))


def training_batch(*counts: int, **options: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The same as batches for training are: without crowds, areas and positions."""
    images, targets, _ = tiny_batch(*counts, **options)
    wanted = ("boxes", "labels", "masks")
    return images, [{name: target[name] for name in wanted if name in target} for target in targets]


def assert_equal_detections(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Compare the detections of a batch bit by bit; there must be some."""
    assert sum(len(one["boxes"]) for one in expected) > 0
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert torch.equal(values, other[name]), name
