from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dia_lightning.datamodules import CocoDetectionDataModule, SampleError
from tests.datamodules.tiny_data import pixels, samples_of
from tests.datamodules.tiny_detection import coco_data, coco_object, edit_json, write_coco


def _annotation(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][0].__setitem__(key, value)


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][0].pop(key)


def _twice(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key].append(dict(content[key][0]))


def _image(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["images"][1].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "no list 'images'"),
        (lambda content: content.pop("annotations"), "no list 'annotations'"),
        (lambda content: content.pop("categories"), "no list 'categories'"),
        (lambda content: content.update(images=[1]), "no list 'images' of objects"),
        (lambda content: content.update(images=[]), "empty list 'images'"),
        (lambda content: content.update(categories=[]), "empty list 'categories'"),
        (lambda content: content.update(annotations=[]), "has no object to train on"),
        (lambda content: content["categories"][0].update(name="bar"), r"category 20 has the name 'bar', expected"),
        (_twice("images"), "the image id 100 more than once"),
        (_twice("annotations"), "the annotation id 1 more than once"),
        (_twice("categories"), "the category id 3 more than once"),
        (_annotation("id", "a"), "the annotation id 'a', expected a whole number"),
        (_annotation("category_id", 4), "annotation 1 has category_id 4, which is not in categories"),
        (_annotation("image_id", "a"), "annotation 1 is for image_id .a., expected a whole number"),
        (_without("bbox"), r"annotation 1 has bbox None, expected \[x, y, width, height\]"),
        (_annotation("bbox", [1, 2, 3]), r"annotation 1 has bbox \[1, 2, 3\], expected"),
        (_annotation("bbox", [1, 2, 3, None]), "annotation 1 has bbox"),
        (_annotation("iscrowd", 2), "annotation 1 has iscrowd 2, expected 0 or 1"),
        (_image("file_name", None), "image 101 has no file_name"),
        (_image("file_name", "../../x.png"), r"file_name '\.\./\.\./x\.png', which leads out of .*images"),
        (_image("file_name", "/etc/hostname"), "file_name '/etc/hostname', which leads out"),
    ],
)
def test_file_that_is_not_in_the_format_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    write_coco(tmp_path)
    with edit_json(tmp_path / "instances_train.json") as content:
        change(content)
    with pytest.raises(ValueError, match=rf"instances_train\.json.*{message}"):
        coco_data(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, r"annotation 1 has no segmentation, but masks=True needs one"),
        ([], "has no segmentation"),
        ([[1, 2, 3, 4]], "not a list of polygons"),
        ([[1, 2, 3, 4, 5, float("nan")]], "not a list of polygons"),
        ([[1, 2, 3, 4, 5, 1e12]], "not a list of polygons"),
        ({"counts": [1]}, "neither a list of polygons nor run lengths"),
        ({"size": [9, 9], "counts": [81]}, r"run lengths of size \[9, 9\], but the image has \[52, 64\]"),
        ({"size": [52, 64], "counts": [81]}, "run lengths for 81 pixels"),
        ({"size": [52, 64], "counts": [3329, -1]}, "not whole numbers of 0 or more"),
        ({"size": None, "counts": "abc"}, "run lengths of size None"),
        ({"size": [52, 64], "counts": 5}, "run lengths of type int"),
    ],
)
def test_segmentation_that_gives_no_mask_is_refused_only_if_masks_are_wanted(
    tmp_path: Path, segmentation: Any, message: str
) -> None:
    write_coco(tmp_path)
    with edit_json(tmp_path / "instances_train.json") as content:
        content["annotations"] = [coco_object(1, 101, segmentation=segmentation)]
    coco_data(tmp_path).setup("fit")
    with pytest.raises(ValueError, match=message):
        coco_data(tmp_path, masks=True).setup("fit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "must hold an object .* got a value of list"),
        ("3", "of int"),
    ],
)
def test_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write_coco(tmp_path)
    (tmp_path / "instances_val.json").write_text(text)
    with pytest.raises(ValueError, match=rf"instances_val\.json.*{message}"):
        coco_data(tmp_path).setup("fit")


def test_missing_file_is_explained(tmp_path: Path) -> None:
    message = r"instances_train2017\.json is not a file: .*train_annotations.*train2017.*\$DIA_DATA.*cocodataset\.org"
    with pytest.raises(FileNotFoundError, match=message):
        CocoDetectionDataModule(root=str(tmp_path)).setup("fit")
    with pytest.raises(FileNotFoundError, match=message):
        _ = CocoDetectionDataModule(root=str(tmp_path)).num_classes


def test_missing_images_are_counted_and_named_when_the_split_is_opened(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for i in (1, 2, 3, 5):
        (tmp_path / "images" / f"train_{i}.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"4 of 6 images of .*train_1\.png, .*train_2\.png, .*train_3\.png, \.\."
    ):
        coco_data(tmp_path).setup("fit")


def test_image_of_another_size_than_its_file_says_is_an_error_with_both(tmp_path: Path) -> None:
    write_coco(tmp_path)
    Image.fromarray(pixels(50, 10, 3)).save(tmp_path / "images" / "val_0.png")
    data = coco_data(tmp_path)
    data.setup("validate")
    with pytest.raises(SampleError, match=r"val_0\.png\) .* has 10 x 50 pixels, but its annotations say 60 x 50"):
        next(iter(data.val_dataloader()))


def test_sizes_that_the_file_lacks_are_read_from_the_images(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with edit_json(tmp_path / "instances_val.json") as content:
        for image in content["images"]:
            del image["width"], image["height"]
        content["annotations"] = [coco_object(1, 200, bbox=[40, 40, 30, 30])]
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by a quarter: 50 x 60
    Image.fromarray(pixels(50, 60, 3)).save(tmp_path / "images" / "val_0.png", exif=turned)
    data = coco_data(tmp_path)
    with pytest.warns(UserWarning, match="1 of 1 boxes .* reach out"):
        data.setup("validate")
    image, target, _ = samples_of(data.val_dataloader())[0]
    assert image.shape == (3, 60, 50)
    assert target["boxes"].tolist() == [[40, 40, 50, 60]]
