from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from dia_lightning.datamodules import DigitScenesDataModule
from dia_lightning.datamodules._detection_transforms import build_detection_transform
from tests.datamodules.tiny_data import samples_of
from tests.datamodules.tiny_detection import coco_data, write_coco

AUGMENTS: list[Any] = ["none", "hflip", "flips", "lsj", "ssd"]
GEOMETRIC: list[Any] = AUGMENTS[1:]


def _scenes(augment: Any, **options: Any) -> list[Any]:
    data = DigitScenesDataModule(train_size=12, masks=True, augment=augment, **options)
    data.setup("fit")
    return samples_of(data.train_dataloader())


def _empty(height: int = 40, width: int = 60) -> tuple[Any, dict[str, Any]]:
    image = tv_tensors.Image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(height, width))
    masks = tv_tensors.Mask(torch.zeros(0, height, width, dtype=torch.uint8))
    return image, {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64), "masks": masks}


@pytest.mark.parametrize("augment", AUGMENTS)
def test_boxes_stay_valid_and_belong_to_their_masks(augment: Any) -> None:
    torch.manual_seed(0)
    for _ in range(3):
        for image, target in _scenes(augment):
            height, width = image.shape[1:]
            boxes, masks = target["boxes"], target["masks"]
            assert image.dtype == boxes.dtype == torch.float32
            assert 0 <= image.min() <= image.max() <= 1
            assert type(image) is type(boxes) is type(masks) is torch.Tensor
            assert len(boxes) == len(masks) == len(target["labels"])
            assert masks.shape[1:] == (height, width)
            assert ((masks == 0) | (masks == 1)).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([width, height, width, height])).all()
            if len(boxes) > 0:
                inside = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
                assert (inside[:, :2] >= boxes[:, :2] - 1.5).all()
                assert (inside[:, 2:] <= boxes[:, 2:] + 1.5).all()


@pytest.mark.parametrize("augment", ["hflip", "flips"])
def test_flips_keep_every_object_and_its_tight_box(augment: Any) -> None:
    torch.manual_seed(0)
    before = _scenes("none")
    moved = 0
    for (image, target), (flipped, after) in zip(before, _scenes(augment), strict=True):
        assert after["labels"].tolist() == target["labels"].tolist()
        assert torch.equal(after["boxes"], masks_to_boxes(after["masks"]) + torch.tensor([0, 0, 1, 1]))
        assert any(torch.equal(flipped, torch.flip(image, axes)) for axes in ([], [1], [2], [1, 2]))
        moved += not torch.equal(flipped, image)
    assert 0 < moved < 12


def test_hflip_never_turns_images_upside_down() -> None:
    torch.manual_seed(0)
    for (image, _), (flipped, _) in zip(_scenes("none"), _scenes("hflip"), strict=True):
        assert torch.equal(flipped, image) or torch.equal(flipped, image.flip(2))


def test_large_scale_jitter_gives_one_size_and_many_scales() -> None:
    torch.manual_seed(0)
    samples = _scenes("lsj")
    assert {image.shape for image, _ in samples} == {(3, 1024, 1024)}
    heights = torch.cat([target["boxes"][:, 3] - target["boxes"][:, 1] for _, target in samples])
    assert heights.max() / heights.min() > 4


def test_ssd_changes_colours_and_sizes() -> None:
    torch.manual_seed(0)
    before, after = _scenes("none"), _scenes("ssd")
    assert len({image.shape for image, _ in after}) > 4
    assert not any(torch.equal(one[0], other[0]) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("augment", AUGMENTS)
def test_images_without_objects_pass(augment: Any) -> None:
    torch.manual_seed(0)
    transform = build_detection_transform(augment)
    for _ in range(10):
        image, target = transform(*_empty())
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == (0,)
        assert target["masks"].shape == (0, *image.shape[1:])


@pytest.mark.parametrize("augment", GEOMETRIC)
def test_evaluation_is_never_augmented(tmp_path: Path, augment: Any) -> None:
    write_coco(tmp_path)
    plain, augmented = coco_data(tmp_path), coco_data(tmp_path, augment=augment)
    for data in (plain, augmented):
        data.setup("validate")
    pairs = zip(samples_of(plain.val_dataloader()), samples_of(augmented.val_dataloader()), strict=True)
    for (image, target, _), (other, same, _) in pairs:
        assert torch.equal(image, other)
        assert all(torch.equal(target[key], same[key]) for key in ("boxes", "labels", "iscrowd", "area"))


@pytest.mark.parametrize("augment", ["hflip", "flips"])
def test_box_of_less_than_a_pixel_is_left_out_with_its_label_and_mask(augment: Any) -> None:
    image, target = _empty()
    target["boxes"] = tv_tensors.BoundingBoxes([[5, 5, 5.5, 9], [2, 2, 50, 38]], format="XYXY", canvas_size=(40, 60))
    target["labels"] = torch.tensor([1, 2])
    target["masks"] = tv_tensors.Mask(torch.ones(2, 40, 60, dtype=torch.uint8))
    _, after = build_detection_transform(augment)(image, target)
    assert after["labels"].tolist() == [2]
    assert after["boxes"].shape == (1, 4)
    assert after["masks"].shape == (1, 40, 60)


def test_object_that_was_cut_out_is_left_out_even_if_its_box_reaches_in(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DigitScenesDataModule(train_size=4, masks=True, augment="hflip")
    data.setup("fit")
    dataset: Any = data.train_dataloader().dataset

    def lose_first(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        target["masks"][0] = 0
        return image, target

    whole = len(dataset[0][1]["labels"])
    monkeypatch.setattr(dataset, "_transform", lose_first)
    assert len(dataset[0][1]["labels"]) == len(dataset[0][1]["masks"]) == whole - 1
