"""Annotation files of other programs and systems: names, numbers, entries and areas."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dia_lightning.datamodules import CocoDetectionDataModule
from tests.datamodules.tiny_data import samples_of, warnings_of
from tests.datamodules.tiny_detection import coco_data, coco_object, edit_json, write_coco

_TINY: dict[str, Any] = {"batch_size": 1, "num_workers": 0, "pin_memory": False}


def _nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize(
    ("on_disk", "in_file"),
    [
        (_nfd("Grün.png"), "Grün.png"),
        ("Grün.png", _nfd("Grün.png")),
        ("a.PNG", "a.png"),
        ("deep/a.png", "deep\\a.png"),
        (_nfd("Äcker/a.png"), "./Äcker//a.png"),
        ("a b.png", " a b.png"),
        ("a.png", "\ufeffa.png"),
    ],
)
def test_file_names_find_their_files(tmp_path: Path, on_disk: str, in_file: str) -> None:
    write_coco(tmp_path)
    (tmp_path / "images" / on_disk).parent.mkdir(exist_ok=True)
    (tmp_path / "images" / "val_1.png").rename(tmp_path / "images" / on_disk)
    with edit_json(tmp_path / "instances_val.json") as content:
        content["images"][1]["file_name"] = in_file
    data = coco_data(tmp_path)
    assert warnings_of(data) == []
    assert len(samples_of(data.val_dataloader())[1][1]["boxes"]) == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_numbers_and_encodings_of_other_programs_are_read(tmp_path: Path, encoding: str) -> None:
    write_coco(tmp_path)
    path = tmp_path / "instances_val.json"
    expected = coco_data(tmp_path)
    expected.setup("validate")
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = str(image["id"])
    for annotation in content["annotations"]:
        annotation |= {"id": float(annotation["id"]), "image_id": str(annotation["image_id"]), "iscrowd": False}
        annotation["category_id"] = float(annotation["category_id"])
    path.write_bytes(json.dumps(content).encode(encoding))
    data = coco_data(tmp_path)
    data.setup("validate")
    for (_, ours, _), (_, theirs, _) in zip(
        samples_of(data.val_dataloader()), samples_of(expected.val_dataloader()), strict=True
    ):
        assert {key: value.tolist() for key, value in ours.items()} == {k: v.tolist() for k, v in theirs.items()}


@pytest.mark.parametrize(("root", "folder"), [(".", "."), ("./", ""), ("../here", "./"), (None, ".")])
def test_images_beside_their_annotations_are_found_however_the_folder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str | None, folder: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.new("RGB", (64, 48)).save("a.png")
    Image.new("RGB", (64, 48)).save("../outside.png")
    content: dict[str, Any] = {"annotations": [coco_object(1, 1)], "categories": [{"id": 3, "name": "disc"}]}
    options: dict[str, Any] = {"root": root or str(tmp_path / "here"), "train_images": folder, "val_images": folder}
    options |= {"train_annotations": "t.json", "val_annotations": "t.json", **_TINY}
    for name in ("a.png", "../outside.png"):
        content["images"] = [{"id": 1, "file_name": name, "width": 64, "height": 48}]
        Path("t.json").write_text(json.dumps(content))
        data = CocoDetectionDataModule(**options)
        if name == "a.png":
            data.setup("fit")
            assert len(samples_of(data.train_dataloader())) == 1
        else:
            with pytest.raises(ValueError, match="leads out of"):
                data.setup("fit")


def test_entries_of_one_file_are_one_picture(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with edit_json(tmp_path / "instances_train.json") as content:
        twins = [dict(content["images"][3], id=900, file_name="./train_3.png"), dict(content["images"][3], id=901)]
        content["images"] += [twins[0], {"id": 901, "file_name": "train_3.png"}]
        equal = next(a for a in content["annotations"] if a["image_id"] == 103)
        content["annotations"] += [dict(equal, id=91, image_id=900), coco_object(92, 901)]
    data = coco_data(tmp_path)
    [told] = warnings_of(data)
    assert "8 entries for 6 image files" in told
    assert "train_3.png" in told
    targets = [target for _, target in samples_of(data.train_dataloader())]
    assert [len(target["boxes"]) for target in targets] == [0, 1, 2, 4, 0, 1]
    with edit_json(tmp_path / "instances_train.json") as content:
        content["images"][-1] |= {"width": 5, "height": 5}
    with pytest.raises(ValueError, match=r"images 103, 900, 901 for one file, .*train_3\.png, with different sizes"):
        coco_data(tmp_path).setup("fit")


def test_annotations_of_images_that_are_not_in_the_file_are_counted(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with edit_json(tmp_path / "instances_train.json") as content:
        content["annotations"] += [coco_object(91, 999), coco_object(92, 998)]
    data = coco_data(tmp_path)
    [told] = warnings_of(data)
    assert "2 of 9 annotations of" in told
    assert "annotation 91 for image_id 999; they are left out" in told
    with edit_json(tmp_path / "instances_train.json") as content:
        content["annotations"] = content["annotations"][-2:]
    with pytest.raises(ValueError, match=r"2 of 2 annotations .* so nothing is left"):
        coco_data(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("areas", "expected", "wrong"),
    [
        ([100, 900, 20], [100, 900, 20], 0),
        ([0, 900, 100000], [100, 900, 400], 2),
        ([0.01, 900, 350], [100, 900, 350], 1),  # a share of the image
        ([50, 50, 50], [100, 900, 400], 3),
    ],
)
def test_areas_that_cannot_be_true_are_those_of_the_boxes(
    tmp_path: Path, areas: list[float], expected: list[float], wrong: int
) -> None:
    write_coco(tmp_path)
    with edit_json(tmp_path / "instances_val.json") as content:
        content["annotations"] = [
            coco_object(i + 1, 200, bbox=[1, 1, side, side], area=area)
            for i, (side, area) in enumerate(zip((10, 30, 20), areas, strict=True))
        ]
    data = coco_data(tmp_path)
    told = warnings_of(data, "validate")
    assert [f"{wrong} of 3 annotations" in text for text in told] == [True] * bool(wrong)
    assert samples_of(data.val_dataloader())[0][1]["area"].tolist() == expected


def test_picture_in_two_annotation_files_is_told_of(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with edit_json(tmp_path / "instances_val.json") as content:
        content["images"][0] |= {"file_name": "../images/./train_0.png", "width": 60, "height": 50}
    [told] = warnings_of(coco_data(tmp_path))
    assert "1 of 3 images of the validation part are training images, too" in told
    assert "train_0.png" in told


@pytest.mark.parametrize(("folder", "told"), [("mine", ["1 images"]), ("images", [])])
def test_images_that_no_file_lists_are_counted_unless_splits_share_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, told: list[str]
) -> None:
    write_coco(tmp_path)
    (tmp_path / "mine").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"train_{number}.png").rename(tmp_path / folder / f"train_{number}.png")
    Image.new("L", (4, 4)).save(tmp_path / folder / "extra.png")
    said: list[str] = []
    monkeypatch.setattr("dia_lightning.datamodules._coco_entries.rank_zero_info", said.append)
    coco_data(tmp_path, train_images=folder).setup("fit")
    assert [text[: text.index(" beside")] for text in said] == told
    assert all("extra.png" in text for text in said)
