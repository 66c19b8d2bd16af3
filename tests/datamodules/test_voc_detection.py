import hashlib
import tarfile
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from torchvision import datasets

from dia_lightning.datamodules import VOCDetectionDataModule, voc_detection
from tests.datamodules.tiny_data import samples_of
from tests.datamodules.tiny_detection import voc_object, write_voc, write_voc_xml


def _data(root: Path, **options: Any) -> VOCDetectionDataModule:
    settings: dict[str, Any] = {"augment": "none", "batch_size": 2, "num_workers": 0, "pin_memory": False}
    return VOCDetectionDataModule(root=str(root), **{**settings, **options})


@pytest.fixture
def tiny_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two archives as VOC 2007 is delivered, in a folder that ``$DIA_VOC_URL`` is."""
    served = tmp_path / "served"
    whole = write_voc(tmp_path / "whole", "2007")
    served.mkdir()
    entries = {key: dict(entry) for key, entry in datasets.voc.DATASET_YEAR_DICT.items()}
    for key, splits in (("2007", ("train", "val")), ("2007-test", ("test",))):
        archive = served / entries[key]["filename"]
        with tarfile.open(archive, "w") as tar:
            for file in sorted(path for path in whole.rglob("*") if path.is_file()):
                if file.stem.split("_")[0] in splits:
                    tar.add(file, file.relative_to(tmp_path / "whole"))
        entries[key]["md5"] = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(voc_detection, "DATASET_YEAR_DICT", entries)
    monkeypatch.setenv("DIA_VOC_URL", f"{served.as_uri()}/")
    return served


@pytest.mark.parametrize(("year", "split"), [("2007", "test"), ("2012", "val")])
def test_boxes_and_labels_are_those_of_torchvision_but_for_the_first_pixel(
    tmp_path: Path, year: Any, split: str
) -> None:
    write_voc(tmp_path, year)
    data = _data(tmp_path, year=year)
    data.setup("test")
    reference = datasets.VOCDetection(str(tmp_path), year=year, image_set=split)
    wrapped = datasets.wrap_dataset_for_transforms_v2(reference)
    ours = samples_of(data.test_dataloader())
    assert len(ours) == len(reference) == 2
    assert len(ours[0][1]["labels"]) == 0  # torchvision fails on an image without objects
    image, target, _ = ours[1]
    pixels, expected = wrapped[1]
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
    # VOC counts pixels from 1 and includes the last one; torchvision takes the numbers as they are.
    assert torch.equal(target["boxes"] + torch.tensor([1, 1, 0, 0]), expected["boxes"].float())
    assert target["labels"].tolist() == expected["labels"].tolist()
    assert target["area"].tolist() == [120]


def test_whole_image_is_a_box_from_0_to_its_size(tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    write_voc_xml(folder / "Annotations" / "train_0.xml", voc_object("cat", (0, 0, 64, 48)))
    data = _data(tmp_path, on_bad_box="raise")
    data.setup("fit")
    assert samples_of(data.train_dataloader())[0][1]["boxes"].tolist() == [[0, 0, 64, 48]]


def test_difficult_objects_are_not_trained_on_and_do_not_count_in_evaluation(tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    objects = voc_object("cat", (1, 1, 9, 9), difficult=True) + voc_object("dog", (20, 1, 9, 9))
    for name in ("train_0", "val_0"):
        write_voc_xml(folder / "Annotations" / f"{name}.xml", objects)
    data = _data(tmp_path)
    data.setup("fit")
    assert samples_of(data.train_dataloader())[0][1]["labels"].tolist() == [data.class_names.index("dog") + 1]
    assert samples_of(data.val_dataloader())[0][1]["iscrowd"].tolist() == [1, 0]


def test_parts_of_objects_are_no_objects(tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    write_voc_xml(
        folder / "Annotations" / "train_0.xml",
        voc_object("person", (5, 5, 20, 20)).replace("<difficult>", f"{part}<difficult>"),
    )
    data = _data(tmp_path)
    data.setup("fit")
    assert samples_of(data.train_dataloader())[0][1]["boxes"].tolist() == [[5, 5, 25, 25]]


def test_own_data_lie_in_root_and_have_own_classes(tmp_path: Path, no_network: None) -> None:
    folder = write_voc(tmp_path, names=("red cell", "white cell", "platelet"))
    data = _data(folder, classes=["platelet", "white cell", "red cell"])
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == 3
    assert [target["labels"].tolist() for _, target in samples_of(data.train_dataloader())] == [[], [3], [3], [3, 1]]


def test_2012_is_tested_on_its_validation_part(tmp_path: Path) -> None:
    write_voc(tmp_path)
    data = _data(tmp_path)
    with pytest.warns(UserWarning, match="the validation part is tested on"):
        data.setup("test")
    assert data.sample_name(0).endswith("val_0.jpg")
    assert data.image_id(0) == 1


def test_bad_box_is_named_with_file_and_object(tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    objects = voc_object("cat", (1, 1, 9, 9)) + voc_object("dog", (20, 9, 9, -2))
    write_voc_xml(folder / "Annotations" / "train_3.xml", objects)
    with pytest.raises(
        ValueError, match=r"train\.txt are bad: .*train_3\.jpg \(object 2, dog, box 20, 9, 29, 7, no wi"
    ):
        _data(tmp_path, on_bad_box="raise").setup("fit")


@pytest.mark.parametrize("size", ["", "<width>0</width><height>0</height>"])
def test_size_that_the_annotation_lacks_is_read_from_the_image(tmp_path: Path, size: str) -> None:
    folder = write_voc(tmp_path)
    write_voc_xml(folder / "Annotations" / "train_0.xml", voc_object("cat", (60, 40, 30, 30)), size=size)
    data = _data(tmp_path)
    with pytest.warns(UserWarning, match="clipped"):
        data.setup("fit")
    assert samples_of(data.train_dataloader())[0][1]["boxes"].tolist() == [[60, 40, 64, 48]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", r"train_1\.xml is not valid XML"),
        ("", r"train_1\.xml is not valid XML"),
        (voc_object("wolf", (1, 1, 5, 5)), r"train_1\.xml .* class 'wolf', which is not in the option classes"),
        (voc_object("cat", (1, 1, 5, 5)).replace("bndbox", "box"), r"train_1\.xml: object 1 \(cat\) has no box .*None"),
        (voc_object("cat", (1, 1, 5, 5)).replace("<xmin>2", "<xmin>x"), "no box of four numbers: xmin 'x', ymin '2'"),
    ],
)
def test_broken_annotation_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = write_voc(tmp_path)
    whole = text if "object" not in text or text.startswith("<annotation>") else f"<annotation>{text}</annotation>"
    (folder / "Annotations" / "train_1.xml").write_text(whole)
    with pytest.raises(ValueError, match=message):
        _data(tmp_path).setup("fit")


def test_annotation_cannot_read_other_files(tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    (tmp_path / "secret").write_text("cat")
    entity = f'<!DOCTYPE a [<!ENTITY x SYSTEM "{(tmp_path / "secret").as_uri()}">]>'
    text = f"{entity}<annotation>{voc_object('&x;', (1, 1, 5, 5))}</annotation>"
    (folder / "Annotations" / "train_1.xml").write_text(text)
    with pytest.raises(ValueError, match=r"train_1\.xml"):
        _data(tmp_path).setup("fit")


@pytest.mark.parametrize("name", ["JPEGImages/train_1.jpg", "Annotations/train_1.xml"])
def test_missing_file_of_a_split_is_named(tmp_path: Path, name: str) -> None:
    (write_voc(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is not a file, but .*train\.txt has 'train_1'"):
        _data(tmp_path).setup("fit")


@pytest.mark.parametrize(("text", "message"), [("", r"train\.txt is empty"), ("../x\n", "'../x', which leads out of")])
def test_unusable_list_of_images_is_named(tmp_path: Path, text: str, message: str) -> None:
    (write_voc(tmp_path) / "ImageSets" / "Main" / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        _data(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"year": "2010"}, r"year must be one of 2007, 2012, got '2010'\."),
        ({"classes": []}, r"classes must be names, each once, .*got \[\]"),
        ({"classes": ["a", "a"]}, "classes must be names, each once"),
        ({"val_split": 0.1}, r"val_split must be 0 beside ImageSets/Main/val\.txt, got 0\.1"),
    ],
)
def test_impossible_option_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _data(tmp_path, **options)


# Download


def test_archives_are_unpacked_and_not_fetched_again(
    tmp_path: Path, tiny_archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _data(tmp_path / "data", year="2007")
    data.prepare_data()
    data.setup()
    sizes = [len(samples_of(loader)) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert [*sizes, len(samples_of(data.test_dataloader()))] == [4, 2, 2]
    monkeypatch.setattr("dia_lightning.datamodules.base.obtain", lambda *args, **kwargs: pytest.fail("fetched again"))
    _data(tmp_path / "data", year="2007").prepare_data()


def test_training_part_alone_is_enough_if_nothing_may_be_fetched(tmp_path: Path, tiny_archives: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    archive = next(path for path in tiny_archives.iterdir() if "trainval" in path.name)
    (root / archive.name).write_bytes(archive.read_bytes())
    data = _data(root, year="2007", download=False)
    data.prepare_data()
    data.setup("fit")
    with pytest.warns(UserWarning, match="the validation part is tested on"):
        data.setup("test")


def test_missing_data_are_explained(tmp_path: Path) -> None:
    message = r"no whole, unpacked VOCtrainval_11-May-2012\.tar in .*md5 6cd6e144.*\$DIA_VOC_URL"
    data = _data(tmp_path, download=False)
    for step in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError, match=message):
            step()


def test_command_line_shows_every_argument() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VOCDetectionDataModule, "data")
    assert set(parser.get_defaults().data.as_dict()) == set(VOCDetectionDataModule().hparams)
    parsed = parser.parse_args(['--data.classes=["a", "b"]', "--data.year=2007"]).data
    assert (parsed.classes, parsed.year) == (["a", "b"], "2007")
    with pytest.raises(jsonargparse.ArgumentError, match="year"):
        parser.parse_args(["--data.year=2010"])
