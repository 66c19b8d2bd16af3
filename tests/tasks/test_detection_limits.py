"""Images with more objects than are counted, or can be found."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dia_lightning.tasks import DetectionTask, load_task
from tests.tasks.conftest import Given, small_trainer
from tests.tasks.tiny_detection import tiny_task


def squares(count: int) -> Tensor:
    corners = torch.stack([torch.arange(count) % 15 * 20.0, torch.arange(count) // 15 * 20.0], 1)
    return torch.cat([corners, corners + 15], 1)


class Perfect(nn.Module):
    """A "detector" that finds all objects of every image, which are the same."""

    def __init__(self, labels: Tensor, **limits: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        found = {"boxes": squares(len(labels)), "labels": labels, "scores": torch.linspace(1, 0.5, len(labels))}
        self.found = found
        for name, limit in limits.items():
            setattr(self, name, limit)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return [dict(self.found) for _ in images]


def score(
    task: DetectionTask, labels: Tensor, folder: Path, crowds: int = 0, epochs: int = 1
) -> tuple[dict[str, float], list[str]]:
    """Return the scores of an epoch of two images, and what is said about limits."""
    iscrowd = (torch.arange(len(labels)) < crowds).long()
    target = {"boxes": squares(len(labels)), "labels": labels, "iscrowd": iscrowd}
    data = Given([([torch.rand(3, 300, 300)], [target], torch.tensor([number])) for number in range(2)])
    trainer = small_trainer(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(epochs):
            (found,) = trainer.test(task, data, verbose=False)
    return dict(found), [str(each.message) for each in caught if "lower than it could be" in str(each.message)]


def test_more_objects_than_count_are_told_once(tmp_path: Path) -> None:
    labels = torch.ones(150, dtype=torch.long)
    found, told = score(DetectionTask(Perfect(labels), num_classes=2), labels, tmp_path, epochs=2)
    assert found["test/map"] == pytest.approx(67 / 101, abs=1e-3)  # as COCO has it: recall ends at 100 of 150
    (message,) = told
    assert "150 objects of a class, but the scores count only the best 100" in message
    assert "set max_detections=150 (--model.max_detections)" in message


def test_the_limit_can_be_raised(tmp_path: Path) -> None:
    labels = torch.ones(150, dtype=torch.long)
    found, told = score(DetectionTask(Perfect(labels), num_classes=2, max_detections=150), labels, tmp_path)
    assert found["test/map"] == pytest.approx(1)
    assert found["test/mar_150"] == pytest.approx(1)
    assert found["test/ap/1"] == pytest.approx(1)
    assert found["test/mar_10"] == pytest.approx(10 / 150)
    assert not told


@pytest.mark.parametrize(("labels", "crowds"), [(torch.arange(150) % 2 + 1, 0), (torch.ones(150).long(), 50)])
def test_neither_other_classes_nor_crowds_fill_the_limit(labels: Tensor, crowds: int, tmp_path: Path) -> None:
    found, told = score(DetectionTask(Perfect(labels), num_classes=2), labels, tmp_path, crowds)
    assert not told
    if not crowds:
        assert found["test/map"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("detector", "limits"),
    [
        ("fasterrcnn", {"box_detections_per_img": 20, "rpn_post_nms_top_n_test": 30}),
        ("retinanet", {"detections_per_img": 20, "topk_candidates": 30}),
        ("fcos", {"detections_per_img": 20, "topk_candidates": 30}),
    ],
)
def test_limits_of_the_detector_are_told_by_their_names(detector: str, limits: dict[str, int], tmp_path: Path) -> None:
    labels = torch.arange(25) % 2 + 1
    small = {**limits, "min_size": 128, "max_size": 128}
    _, told = score(tiny_task(detector, detector_args=small), labels, tmp_path)
    (first, limit), (second, _) = limits.items()
    assert f'25 objects, but the detector is limited to {first}={limit}: set detector_args={{"{first}": 25}}' in told[0]
    _, told = score(tiny_task(detector, detector_args=small), torch.ones(35).long(), tmp_path)
    assert f'{first}=20, {second}=30: set detector_args={{"{first}": 35, "{second}": 35}} or more' in told[0]
    assert not score(tiny_task(detector, detector_args={**small, first: 25}), labels, tmp_path)[1]


def test_a_checkpoint_keeps_the_limit(tmp_path: Path) -> None:
    task = tiny_task("fcos", max_detections=300)
    trainer = small_trainer(tmp_path, max_epochs=0)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded: Any = load_task(tmp_path / "one.ckpt")
    assert loaded.max_detections == 300
    assert loaded.test_map.max_detection_thresholds == [1, 10, 300]
