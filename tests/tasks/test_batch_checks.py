"""Images and labels of loaders of one's own, which are of another range, type or shape than the task needs."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from dia_lightning.tasks import ClassificationTask
from dia_lightning.tasks._batch_checks import not_in_unit_range, not_symmetric, pixel_range, raw_pixels
from tests.tasks import test_diffusion
from tests.tasks.conftest import Given, small_trainer
from tests.tasks.tiny_detection import tiny_batch, tiny_task


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * (high - low) + low


def classifier() -> ClassificationTask:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return ClassificationTask(network, 5)


NORMAL, LABELS = uniform(-2, 2.5, 4, 3, 8, 8), torch.arange(4)


def told(task: LightningModule, batch: Any, folder: Path, entry: str = "validate") -> list[str]:
    """Return what is said of the data."""
    options: dict[str, Any] = {"limit_val_batches": 0} if entry == "fit" else {}
    trainer = small_trainer(folder, callbacks=[], enable_checkpointing=False, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(trainer, entry)(task, Given([batch, batch]))
    messages = [str(each.message) for each in caught]
    return [text for text in messages if "first batch" in text or "no class" in text]


# ---- classification


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((NORMAL * 50).byte(), LABELS, r"images are torch.uint8, but networks take float32: add .*scale=True"),
        (NORMAL.double(), LABELS, r"float64, but the network is torch.float32: call .float\(\)"),
        (NORMAL[:, :1], LABELS, r"shape \[1, 8, 8\], but the network takes 3 channels"),
        (NORMAL.movedim(1, 3), LABELS, r"shape \[8, 8, 3\], but the network takes 3 channels, as \(C, H, W\)"),
        (NORMAL.where(NORMAL < 2.4, torch.nan), LABELS, r"Image \d of the batch has pixels that are NaN"),
        (NORMAL.where(NORMAL < 2.4, torch.inf), LABELS, r"Image \d of the batch has pixels that are NaN or infinite"),
        (NORMAL, LABELS + 2, r"label 5 is not in 0..4 \(num_classes=5\). Count classes from 0"),
        (NORMAL, LABELS - 1, "label -1 is not in 0..4"),
        (NORMAL, LABELS - 100, "label -100 is not in 0..4"),  # which torch would leave out of the loss
        (NORMAL, LABELS.float(), r"labels are torch.float32 of the shape \[4\], .* int64 \[B\]: call .long\(\)"),
        (NORMAL, LABELS[:, None], r"class indices \[B\].*, got \[4, 1\] of int64"),
    ],
)
@pytest.mark.parametrize("entry", ["fit", "validate"])
def test_a_classifier_refuses_what_it_cannot_learn_from(
    images: Tensor, labels: Tensor, message: str, entry: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        told(classifier(), (images, labels), tmp_path, entry)


def test_probabilities_are_for_training_only(tmp_path: Path) -> None:
    soft = torch.full((4, 5), 0.2)
    assert not told(classifier(), (NORMAL, soft), tmp_path, "fit")
    with pytest.raises(ValueError, match=r"must be class indices \[B\] .*got \[4, 5\] of float32"):
        told(classifier(), (NORMAL, soft), tmp_path)


def test_a_label_out_of_range_is_found_in_later_batches_too(tmp_path: Path) -> None:
    data = Given([(NORMAL, LABELS), (NORMAL, LABELS + 2)])
    with pytest.raises(ValueError, match="label 5 is not in"):
        small_trainer(tmp_path).test(classifier(), data)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_any_whole_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    for entry in ("fit", "validate"):
        assert not told(classifier(), (NORMAL, LABELS.to(dtype)), tmp_path, entry)


def test_raw_pixels_are_told_once(tmp_path: Path) -> None:
    raw = uniform(0, 255, 4, 3, 8, 8).round()
    (message,) = told(classifier(), (raw, LABELS), tmp_path)
    assert "integers from 0 to 255" in message or "integers from 1 to 25" in message


@pytest.mark.parametrize("images", [NORMAL, NORMAL * 100, NORMAL.abs() * 100, NORMAL.abs(), (NORMAL > 0).float() * 15])
def test_a_classifier_takes_any_other_range(images: Tensor) -> None:
    assert raw_pixels(images, *pixel_range(images)) is None


# ---- diffusion


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0, 1, r"from 0 to 1, but DiffusionTask needs [-1, 1]. If they are in [0, 1], pass 2 * images - 1"),
        (0.1, 0.9, "from 0.1 to 0.9, but DiffusionTask needs [-1, 1]"),
        (-0.5, 0.5, "If they are in [-0.5, 0.5], pass 2 * images,"),
    ],
)
def test_images_that_are_not_symmetric_are_told(low: float, high: float, message: str) -> None:
    assert message in (not_symmetric(low, high) or "")


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-1, -0.5), (-0.6, 0.4), (-1, 0), (-0.01, 1), (0, 0)])
def test_images_in_the_range_of_diffusion_are_not(low: float, high: float) -> None:
    assert not_symmetric(low, high) is None


def test_diffusion_warns_once_and_refuses_types_and_labels(tmp_path: Path) -> None:
    task = test_diffusion.tiny_task(conditional=True)
    images, labels = test_diffusion.some_batch()
    assert not told(task, (images, labels), tmp_path)
    (message,) = told(task, (images / 2 + 0.5, labels), tmp_path)
    assert "DiffusionTask needs [-1, 1]" in message
    (message,) = told(task, (images, labels + 1), tmp_path)
    assert "the label 3, which stands for no class" in message
    for batch, refusal in (
        ((images.byte(), labels), "torch.uint8"),
        ((images.where(images < 0.9, torch.nan), labels), "NaN or infinite"),
        ((images, labels.float()), "torch.float32 of the shape"),
        ((images, labels + 2), "label 4 is not in 0..2"),
    ):
        with pytest.raises(ValueError, match=refusal):
            told(task, batch, tmp_path)


# ---- detection


@pytest.mark.parametrize(
    ("low", "high", "way"),
    [(-1, 1, "remove the normalisation"), (-2.1, 2.6, "remove the normalisation"), (0, 255, "add torchvision")],
)
def test_images_of_a_detector_must_be_in_the_unit_range(low: float, high: float, way: str) -> None:
    message = not_in_unit_range(low, high)
    assert message is not None
    assert f"from {low:.3g} to {high:.3g}, but DetectionTask needs [0, 1]" in message
    assert way in message
    assert not_in_unit_range(-0.004, 1.002) is None


def test_a_detector_tells_what_is_unusual(tmp_path: Path) -> None:
    images, targets, index = tiny_batch(2, 1)
    task = tiny_task("retinanet")
    assert not told(task, (images, targets, index), tmp_path)
    assert not told(task, ([image[:1] for image in images], targets, index), tmp_path)  # which torchvision repeats
    (message,) = told(task, ([image * 2 - 1 for image in images], targets, index), tmp_path)
    assert "but DetectionTask needs [0, 1]" in message

    def changed(factor: float) -> Any:
        return images, [{**target, "boxes": target["boxes"] * factor} for target in targets], index

    (message,) = told(tiny_task("retinanet"), changed(0.01), tmp_path)
    assert "All boxes of the first batch are in [0, 1]" in message
    (message,) = told(tiny_task("retinanet"), changed(4), tmp_path)
    assert "extends beyond its image of 64 x 64 pixels" in message
    plain = tiny_task("retinanet", detector_args={"image_mean": [0.0] * 3, "image_std": [1.0] * 3})
    assert not told(plain, ([image * 2 - 1 for image in images], targets, index), tmp_path)


def test_a_detector_refuses_what_fits_in_no_way(tmp_path: Path) -> None:
    images, targets, index = tiny_batch(2, 1)
    task = tiny_task("retinanet")

    def corners_and_sizes(target: dict[str, Tensor]) -> dict[str, Tensor]:
        boxes = target["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        return {**target, "boxes": boxes}

    far = [{**target, "boxes": target["boxes"] + torch.tensor([40.0, 0, 40, 0])} for target in targets]
    floats = [{**target, "labels": target["labels"].float()} for target in targets]
    for batch, refusal in (
        (([(image * 255).byte() for image in images], targets, index), "images are torch.uint8"),
        (([image.expand(3, -1, -1)[:2] for image in images], targets, index), r"\[2, 64, 64\], but .* \[3, H, W\]"),
        (([image * torch.nan for image in images], targets, index), "Image 0 of the batch has pixels that are NaN"),
        (
            (images, [corners_and_sizes(target) for target in far], index),
            "x1 < x2 and y1 < y2: torchvision.ops.box_convert",
        ),
        ((images, [{"labels": target["labels"]} for target in targets], index), "has no boxes"),
        ((images, floats, index), r"labels of image 0 of the batch are floats"),
        ((images, [{**target, "labels": target["labels"] + 3} for target in targets], index), "labels must be 1 to 3"),
    ):
        for entry in ("fit", "validate"):
            with pytest.raises(ValueError, match=refusal):
                told(task, batch, tmp_path, entry)
