import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.datamodules.tiny_data import samples_of
from tests.datamodules.tiny_detection import coco_data, edit_json, write_coco

NAN, INF = float("nan"), float("inf")

# x, y, width, height in an image of 64 x 52
BAD = [
    ([NAN, 1, 5, 5], "NaN or infinite"),
    ([1, 1, INF, 5], "NaN or infinite"),
    ([1, -INF, 5, 5], "NaN or infinite"),
    ([5, 5, 0, 5], "no width or height"),
    ([5, 5, 5, -3], "no width or height"),
    ([64, 5, 5, 5], "outside the image"),
    ([5, -10, 5, 10], "outside the image"),
    ([1000, 1000, 5, 5], "outside the image"),
    ([63.5, 5, 5, 5], "less than a pixel inside the image"),
    ([5, 5, 1e-6, 5], "less than a pixel inside the image"),
]


def _write(root: Path, boxes: Sequence[Sequence[float]], split: str = "train", **values: Any) -> None:
    write_coco(root, masks=True)
    with edit_json(root / f"instances_{split}.json") as content:
        image = content["images"][1]["id"]
        template = content["annotations"][0]
        content["annotations"] = [
            {**template, "id": i + 1, "image_id": image, "bbox": box, **values} for i, box in enumerate(boxes)
        ]


def _warnings_of(root: Path, stage: str = "fit", **options: Any) -> tuple[list[str], Any]:
    data = coco_data(root, masks=True, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup(stage)
    return [str(w.message) for w in caught if "boxes in" in str(w.message)], data


@pytest.mark.parametrize(("box", "reason"), BAD)
def test_bad_box_is_left_out_and_named(tmp_path: Path, box: list[float], reason: str) -> None:
    _write(tmp_path, [[1, 2, 10, 10], box])
    told, data = _warnings_of(tmp_path)
    assert len(told) == 1
    assert "1 of 2 boxes" in told[0]
    for part in ("instances_train.json", "train_1.png", "annotation 2, disc", reason):
        assert part in told[0]
    target = samples_of(data.train_dataloader())[1][1]
    assert target["boxes"].tolist() == [[1, 2, 11, 12]]
    assert len(target["labels"]) == len(target["masks"]) == 1


@pytest.mark.parametrize(("box", "reason"), BAD)
def test_bad_box_is_an_error_on_request(tmp_path: Path, box: list[float], reason: str) -> None:
    _write(tmp_path, [[1, 2, 10, 10], box])
    with pytest.raises(ValueError, match=rf"1 of 2 boxes .*train_1\.png \(annotation 2, disc, box .*{reason}\)\. Corr"):
        coco_data(tmp_path, on_bad_box="raise").setup("fit")


def test_three_of_many_are_named(tmp_path: Path) -> None:
    _write(tmp_path, [[5, 5, 0, 5]] * 5 + [[1, 1, 5, 5]])
    told, _ = _warnings_of(tmp_path)
    assert "5 of 6 boxes" in told[0]
    assert told[0].count("train_1.png") == 3
    assert told[0].endswith(", ...")


@pytest.mark.parametrize("on_bad_box", ["drop", "raise"])
def test_box_partly_outside_is_clipped_and_told_if_it_is_much(tmp_path: Path, on_bad_box: str) -> None:
    _write(tmp_path, [[-20, 10, 30, 10], [54, 40, 10.9, 12.9], [1, 1, 5, 5]])
    told, data = _warnings_of(tmp_path, on_bad_box=on_bad_box)
    assert len(told) == 1
    assert "1 of 3 boxes" in told[0]
    assert "clipped" in told[0]
    assert "annotation 1, disc, box -20, 10, 10, 20)" in told[0]
    boxes = samples_of(data.train_dataloader())[1][1]["boxes"]
    assert boxes.tolist() == [[0, 10, 10, 20], [54, 40, 64, 52], [1, 1, 6, 6]]


def test_good_boxes_cause_no_warning_and_stay_as_they_are(tmp_path: Path) -> None:
    _write(tmp_path, [[0, 0, 64, 52], [10.25, 3.5, 1, 1]])
    told, data = _warnings_of(tmp_path)
    assert told == []
    boxes = samples_of(data.train_dataloader())[1][1]["boxes"]
    assert torch.equal(boxes, torch.tensor([[0, 0, 64, 52], [10.25, 3.5, 11.25, 4.5]]))


def test_every_split_is_told_about_once(tmp_path: Path) -> None:
    _write(tmp_path, [[5, 5, 0, 5], [1, 1, 5, 5]])
    with edit_json(tmp_path / "instances_val.json") as content:
        content["annotations"][0]["bbox"] = [5, 5, 5, 0]
    told, data = _warnings_of(tmp_path)
    assert len(told) == 2
    assert "instances_train.json" in told[0]
    assert "instances_val.json" in told[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
        list(data.train_dataloader())


def test_image_that_loses_all_its_boxes_stays_as_one_without_objects(tmp_path: Path) -> None:
    _write(tmp_path, [[5, 5, 0, 5]], split="val")
    told, data = _warnings_of(tmp_path, "validate")
    assert "1 of 1 boxes" in told[0]
    image, target, _ = samples_of(data.val_dataloader())[1]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, *image.shape[1:])


def test_training_set_that_loses_every_box_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, [[5, 5, 0, 5]])
    with pytest.raises(ValueError, match=r"instances_train\.json has no object to train on"):
        coco_data(tmp_path).setup("fit")
