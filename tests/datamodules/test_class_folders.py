"""Class folders of the splits that were written on different systems."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from dia_lightning.datamodules import ImageFolderDataModule
from tests.datamodules.tiny_data import samples_of, warnings_of, write_image_folder

_TINY: dict[str, Any] = {"batch_size": 1, "num_workers": 0, "pin_memory": False}


def _nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


def _folders(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(root=root, image_size=8, **_TINY, **options)


def test_class_folders_of_another_unicode_form_are_the_same_classes(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train",), classes=("Äpfel", "Birnen", "Zitronen"))
    write_image_folder(tmp_path, splits=("val",), classes=(_nfd("Äpfel"), "Birnen", "Zitronen"))
    data = _folders(tmp_path)
    assert warnings_of(data) == []
    paths = [data._samples["val"].name(index) for index in range(12)]
    labels = [sample[1] for sample in samples_of(data.val_dataloader())]
    for path, label in zip(paths, labels, strict=True):
        assert unicodedata.normalize("NFC", Path(path).parent.name) == data.class_names[label]


def test_labels_of_a_checkpoint_count_where_another_form_would_sort_them_anew(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train", "val"), classes=("Äpfel", "Birnen"))
    trained = [_nfd("Äpfel"), "Birnen"]  # decomposed, Ä comes before B
    data = _folders(tmp_path)
    assert data.class_names == ["Birnen", "Äpfel"]
    data.setup("fit")
    data.load_state_dict({"class_names": trained})
    assert data.class_names == trained
    data.setup("fit")
    assert "Birnen" in data._samples["val"].name(samples_of(data.val_dataloader())[-1][2])
    assert samples_of(data.val_dataloader())[-1][1] == 1


def test_class_folder_of_another_case_is_taken_and_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train",), classes=("A", "a", "red cell"))
    write_image_folder(tmp_path, splits=("val",), classes=("A", "a", "Red  Cell "))
    [told] = warnings_of(_folders(tmp_path))
    assert "'Red  Cell ', which is taken for 'red cell' of training" in told
    write_image_folder(tmp_path, splits=("test",), classes=("A", "a", "b", "red cell"))
    with pytest.raises(ValueError, match="that training did not have: b"):
        _folders(tmp_path).setup("test")


def test_classes_that_may_be_one_are_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train", "val"), classes=("Cat", "cat", "dog"))
    [told] = warnings_of(_folders(tmp_path))
    assert "['Cat', 'cat'], which differ in letter case" in told


def test_folders_of_splits_are_found_in_every_case_and_others_are_told_of(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("Train", "VAL", "validation"))
    data = _folders(tmp_path)
    [told] = warnings_of(data)
    assert "has validation, which nobody looks into" in told
    assert [len(samples_of(loader)) for loader in (data.train_dataloader(), data.val_dataloader())] == [12, 12]
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "Train" / "dog").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"dog is a broken link to gone"):
        _folders(tmp_path).setup("fit")
