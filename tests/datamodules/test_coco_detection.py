import io
import pickle
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as tools  # type: ignore[import-untyped]
from pycocotools.coco import COCO  # type: ignore[import-untyped]
from torchvision import datasets

from dia_lightning.datamodules import CocoDetectionDataModule, SampleError
from tests.datamodules.tiny_data import pixels, pretend_ranks, samples_of
from tests.datamodules.tiny_detection import CATEGORIES, coco_data, coco_object, edit_json, write_coco

# Independent references


def test_boxes_labels_and_pixels_are_those_of_torchvision(tmp_path: Path) -> None:
    write_coco(tmp_path, test=6)
    data = coco_data(tmp_path)
    data.setup("test")
    ids = dict(enumerate(data.category_ids or (), start=1))
    wrapped = datasets.wrap_dataset_for_transforms_v2(
        datasets.CocoDetection(str(tmp_path / "images"), str(tmp_path / "instances_test.json"))
    )
    ours = samples_of(data.test_dataloader())
    assert len(ours) == len(wrapped) == 6
    for (image, target, index), (reference, expected) in zip(ours, wrapped, strict=True):
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(np.array(reference)).permute(2, 0, 1))
        assert data.image_id(index) == expected["image_id"]
        if "boxes" in expected:  # torchvision leaves the key out of images without objects
            assert torch.equal(target["boxes"], expected["boxes"].float())
            assert [ids[label] for label in target["labels"].tolist()] == expected["labels"].tolist()
        else:
            assert (target["boxes"].shape, target["labels"].shape) == ((0, 4), (0,))


def test_masks_of_every_encoding_are_those_of_pycocotools(tmp_path: Path) -> None:
    write_coco(tmp_path, masks=True)
    blob = np.asfortranarray(pixels(50, 60) > 127)
    flat = blob.flatten(order="F").astype(int)
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=flat[0] ^ 1, append=flat[-1] ^ 1))).tolist()
    packed = tools.encode(blob.astype(np.uint8))
    packed["counts"] = packed["counts"].decode()
    loose = {"size": [50, 60], "counts": [0, *runs] if flat[0] else runs}
    two_parts = [[1, 1, 20.5, 1, 20.5, 30, 1, 30], [30, 30, 50, 33, 40, 45.25]]
    segmentations = [packed, loose, two_parts, [[-5, -5, 70, 10, 30, 60]]]
    path = tmp_path / "instances_test.json"
    with edit_json(path) as content:
        content["annotations"] = [coco_object(i + 1, 300, segmentation=s) for i, s in enumerate(segmentations)]
    data = coco_data(tmp_path, masks=True)
    data.setup("test")
    target = samples_of(data.test_dataloader())[0][1]
    reference = COCO(path)
    expected = np.stack([reference.annToMask(annotation) for annotation in reference.loadAnns([1, 2, 3, 4])])
    assert target["masks"].dtype == torch.uint8
    assert np.array_equal(target["masks"].numpy(), expected)
    assert np.array_equal(expected[0], blob)


# The contract of batches


def test_batches_keep_the_contract(tmp_path: Path) -> None:
    write_coco(tmp_path, masks=True)
    data = coco_data(tmp_path, masks=True, augment="hflip")
    data.setup()
    train, val = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    images, index = next(iter(data.predict_dataloader()))
    assert isinstance(images, list)
    assert index.tolist() == val[2].tolist() == [0, 1]
    for batch, keys in ((train, {"boxes", "labels", "masks"}), (val, {"boxes", "labels", "masks", "iscrowd", "area"})):
        for image, target in zip(batch[0], batch[1], strict=True):
            objects, (_, height, width) = len(target["labels"]), image.shape
            assert set(target) == keys
            assert type(image) is type(target["boxes"]) is torch.Tensor
            assert image.dtype == torch.float32
            assert 0 <= image.min() < 0.5 < image.max() <= 1
            assert target["boxes"].shape == (objects, 4)
            assert target["boxes"].dtype == torch.float32
            assert target["labels"].dtype == torch.int64
            assert target["masks"].shape == (objects, height, width)
            assert target["masks"].dtype == torch.uint8
    assert val[1][1]["iscrowd"].dtype == torch.int64
    assert val[1][1]["area"].tolist() == [120.0]


def test_images_without_objects_stay_in_training(tmp_path: Path) -> None:
    write_coco(tmp_path, masks=True)
    data = coco_data(tmp_path, masks=True)
    data.setup("fit")
    targets = [target for _, target in samples_of(data.train_dataloader())]
    assert [len(target["labels"]) for target in targets] == [0, 1, 2, 3, 0, 1]
    assert targets[4]["boxes"].shape == (0, 4)
    assert targets[4]["masks"].shape == (0, 58, 76)


def test_crowds_are_not_trained_on_but_known_in_evaluation(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for split, image in (("train", 100), ("val", 200)):
        with edit_json(tmp_path / f"instances_{split}.json") as content:
            content["annotations"] += [coco_object(91, image, iscrowd=1), coco_object(92, image, iscrowd=0)]
    data = coco_data(tmp_path)
    data.setup("fit")
    assert len(samples_of(data.train_dataloader())[0][1]["labels"]) == 1
    assert samples_of(data.val_dataloader())[0][1]["iscrowd"].tolist() == [1, 0]


@pytest.mark.parametrize("area", [None, float("nan"), "large"])
def test_area_that_the_file_lacks_is_that_of_the_box_or_the_mask(tmp_path: Path, area: Any) -> None:
    write_coco(tmp_path, masks=True)
    with edit_json(tmp_path / "instances_val.json") as content:
        triangle = [[0, 0, 20, 0, 0, 20]]
        content["annotations"] = [coco_object(1, 200, area=area, segmentation=triangle, bbox=[0, 0, 20, 20])]
    areas = []
    for masks in (False, True):
        data = coco_data(tmp_path, masks=masks)
        data.setup("validate")
        areas.append(samples_of(data.val_dataloader())[0][1]["area"].item())
    assert areas[0] == 400
    assert 180 <= areas[1] <= 220


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_every_image_once_and_mark_the_rest(tmp_path: Path, ranks: int) -> None:
    write_coco(tmp_path, val=4 * ranks - 1)
    seen = []
    for rank in range(ranks):
        data = coco_data(tmp_path)
        pretend_ranks(data, ranks, rank)
        data.setup("validate")
        for images, targets, index in data.val_dataloader():
            assert len(images) == len(targets) == len(index)
            seen += index.tolist()
    assert sorted(seen) == [-1, *range(4 * ranks - 1)]


def test_everything_a_worker_gets_can_be_pickled(tmp_path: Path) -> None:
    write_coco(tmp_path, masks=True)
    data = coco_data(tmp_path, masks=True, augment="ssd")
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
        assert len(collate([dataset[0], dataset[1]])[0]) == 2


def test_damaged_image_in_a_worker_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "images" / "val_1.png").write_bytes(b"")
    data = coco_data(tmp_path, num_workers=1)
    data.setup("validate")
    with pytest.raises(SampleError, match=r"Sample 1 \(.*val_1\.png\) cannot be loaded: .*0 bytes"):
        list(data.val_dataloader())


# Classes


def test_labels_follow_the_ids_whatever_their_order_gaps_and_start(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for split in ("train", "val", "test"):
        with edit_json(tmp_path / f"instances_{split}.json") as content:
            content["categories"] = [{"id": 90, "name": "ox"}, {"id": 0, "name": "ant"}, {"id": 7, "name": "bee"}]
            content["annotations"] = [
                coco_object(i, content["images"][0]["id"], category_id=c) for i, c in enumerate((7, 90, 0))
            ]
    data = coco_data(tmp_path)
    assert (data.class_names, data.category_ids, data.num_classes) == (["ant", "bee", "ox"], [0, 7, 90], 3)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert samples_of(loader)[0][1]["labels"].tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 3, "name": "disc"}, {"id": 7, "name": "square"}], r"instances_train\.json has 20 bar\.$"),
        (
            [{"id": 3, "name": "disc"}, {"id": 8, "name": "square"}, {"id": 20, "name": "bar"}],
            r"instances_val\.json has 8 square, .*instances_train\.json has 7 square\.$",
        ),
    ],
)
def test_other_categories_than_in_training_are_named(tmp_path: Path, categories: Any, message: str) -> None:
    write_coco(tmp_path)
    with edit_json(tmp_path / "instances_val.json") as content:
        content.update(categories=categories, annotations=[])
    with pytest.raises(ValueError, match=rf"instances_val\.json has other categories than .*{message}"):
        coco_data(tmp_path).setup("fit")


def test_checkpoint_keeps_the_class_mapping(tmp_path: Path) -> None:
    write_coco(tmp_path)
    file = io.BytesIO()
    torch.save(coco_data(tmp_path).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    elsewhere = coco_data(tmp_path / "nowhere")
    elsewhere.load_state_dict(state)
    assert dict(zip(elsewhere.category_ids or (), elsewhere.class_names, strict=True)) == CATEGORIES
    for split in ("train", "val"):
        with edit_json(tmp_path / f"instances_{split}.json") as content:
            content["categories"].append({"id": 21, "name": "cross"})
    changed = coco_data(tmp_path)
    with pytest.raises(ValueError, match=r"other categories than the checkpoint: .*instances_train\.json has 21 cross"):
        changed.load_state_dict(state)
    (tmp_path / "instances_train.json").unlink()
    evaluated = coco_data(tmp_path)
    evaluated.load_state_dict(state)
    with pytest.raises(ValueError, match=r"instances_val\.json has other categories than the checkpoint: .* 21 cross"):
        evaluated.setup("validate")


def test_evaluation_does_without_training_file_once_the_names_are_known(tmp_path: Path) -> None:
    write_coco(tmp_path)
    state = coco_data(tmp_path).state_dict()
    (tmp_path / "instances_train.json").unlink()
    data = coco_data(tmp_path)
    data.trained_classes = state["class_names"]
    data.setup("test")
    assert data.category_ids == [3, 7, 20]
    data.load_state_dict(state)
    assert samples_of(data.test_dataloader())[2][1]["labels"].tolist() == [1, 2]
    other = coco_data(tmp_path)
    other.trained_classes = ["disc", "bar"]
    with pytest.raises(ValueError, match=r"instances_test\.json has other categories than the checkpoint"):
        other.setup("test")


def test_folder_can_be_predicted_without_any_annotation(tmp_path: Path) -> None:
    Image.fromarray(pixels(30, 20)).save(tmp_path / "x.png")
    data = coco_data(tmp_path / "nowhere", predict_folder=str(tmp_path))
    data.trained_classes = ["ant", "bee"]
    data.setup("predict")
    images, index = next(iter(data.predict_dataloader()))
    assert images[0].shape == (3, 30, 20)
    assert data.image_id(int(index[0])) == 1
    assert data.category_ids is None  # the checkpoint has them


def test_predicted_images_keep_the_ids_of_their_file(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = coco_data(tmp_path, limit=2)
    data.setup("predict")
    for i in range(2):
        assert data.sample_name(i).endswith(f"test_{data.image_id(i) - 300}.png")
    with pytest.raises(IndexError, match="padding"):
        data.image_id(-1)


# Splits


def test_validation_part_is_drawn_where_there_is_no_file_for_it(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = coco_data(tmp_path, val_annotations=None, val_images=None, val_split=2)
    data.setup("fit")
    assert (len(samples_of(data.train_dataloader())), len(samples_of(data.val_dataloader()))) == (4, 2)


def test_validation_part_is_tested_on_where_there_is_no_test_file(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = coco_data(tmp_path, test_annotations=None, test_images=None)
    with pytest.warns(UserWarning, match="the validation part is tested on"):
        data.setup("test")
    assert data.image_id(0) == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("annotations"), "has no list 'annotations'"),
        (lambda content: content["annotations"].clear(), "The 3 test images of CocoDetectionDataModule in .* have no"),
        (lambda content: content["images"][0].update(file_name="gone.png"), "1 of 3 images of .* are not there"),
    ],
)
def test_test_data_that_nothing_can_be_measured_on_are_refused_early(tmp_path: Path, change: Any, message: str) -> None:
    write_coco(tmp_path)
    coco_data(tmp_path).check_test_data()
    with edit_json(tmp_path / "instances_test.json") as content:
        change(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        coco_data(tmp_path).check_test_data()


def test_split_beside_a_validation_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"val_split must be 0 beside val_annotations=.*val2017\.json, got 0\.1"):
        CocoDetectionDataModule(val_split=0.1)


def test_annotations_without_a_folder_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"test_images must be the folder of the images of t\.json, got None"):
        CocoDetectionDataModule(test_annotations="t.json")


def test_nothing_of_masks_is_needed_for_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)
    monkeypatch.setattr("dia_lightning.datamodules._coco_masks.mask_tools", lambda: pytest.fail("not needed"))
    data = coco_data(tmp_path)
    data.setup("fit")
    assert len(samples_of(data.train_dataloader())) == 6


def test_command_line_shows_every_argument() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CocoDetectionDataModule, "data")
    defaults = parser.get_defaults().data.as_dict()
    assert defaults["batch_size"] == 4
    assert defaults["augment"] == "hflip"
    assert defaults["on_bad_box"] == "drop"
    assert set(defaults) == set(CocoDetectionDataModule().hparams)
    with pytest.raises(jsonargparse.ArgumentError, match="on_bad_box"):
        parser.parse_args(["--data.on_bad_box=keep"])
    assert parser.parse_args(["--data.val_annotations=null"]).data.val_annotations is None


@pytest.mark.parametrize(("option", "value"), [("augment", "mosaic"), ("on_bad_box", "keep")])
def test_unknown_choice_is_refused_by_name(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be one of .*, got '{value}'\."):
        CocoDetectionDataModule(**{option: value})  # type: ignore[arg-type]
