"""Symbolic links that a user sets up are followed; those that data bring along do not lead out of their folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dia_lightning.datamodules import (
    CocoDetectionDataModule,
    ImageFolderDataModule,
    ImageTableDataModule,
    VOCDetectionDataModule,
)
from tests.datamodules.test_image_table import several
from tests.datamodules.tiny_detection import write_coco, write_voc


def coco(root: Path) -> Any:
    annotations = {f"{split}_annotations": f"instances_{split}.json" for split in ("train", "val", "test")}
    folders = {f"{split}_images": "images" for split in ("train", "val", "test")}
    return CocoDetectionDataModule(root=root, num_workers=0, **annotations, **folders)  # type: ignore[arg-type]


def voc(root: Path) -> Any:
    return VOCDetectionDataModule(root=root, year="2012", classes=["cat", "dog", "person"], num_workers=0)


def table(root: Path) -> Any:
    return ImageTableDataModule(root=root, image_size=8, batch_size=2, val_split=4, num_workers=0)


def write_table(root: Path) -> None:
    root.mkdir()
    several(root)


#: How data are written and opened, a folder of theirs, and a file in it that an annotation file names.
KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], str, str]] = {
    "coco": (write_coco, coco, "images", "train_0.png"),
    "voc": (write_voc, voc, "VOCdevkit/VOC2012/JPEGImages", "train_0.jpg"),
    "voc_xml": (write_voc, voc, "VOCdevkit/VOC2012/Annotations", "train_0.xml"),
    "table": (write_table, table, "images", "0.png"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_listed_file_that_a_link_leads_out_of_its_folder_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    write, load, folder, name = KINDS[kind]
    write(tmp_path / "data")
    file = tmp_path / "data" / folder / name
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{file.stem}.* symbolic link .*out of"):
        load(tmp_path / "data").setup("fit")


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_to_a_file_beside_it_is_followed(kind: str, tmp_path: Path) -> None:
    write, load, folder, name = KINDS[kind]
    write(tmp_path / "data")
    file = tmp_path / "data" / folder / name
    file.rename(file.with_name(f"kept{file.suffix}"))
    file.symlink_to(f"kept{file.suffix}")
    load(tmp_path / "data").setup("fit")


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_root_or_folder_on_another_disk_is_followed(kind: str, whole: bool, tmp_path: Path) -> None:
    write, load, folder, _ = KINDS[kind]
    write(tmp_path / "data")
    place = tmp_path / "data" if whole else tmp_path / "data" / folder
    place.rename(tmp_path / "disk")
    place.symlink_to(tmp_path / "disk")
    load(tmp_path / "data").setup("fit")


def test_a_folder_deeper_down_that_leads_out_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "data")
    (tmp_path / "data" / "images").rename(tmp_path / "disk")
    (tmp_path / "data" / "all").mkdir()
    (tmp_path / "data" / "all" / "images").symlink_to(tmp_path / "disk")
    path = tmp_path / "data" / "train.csv"
    path.write_text(path.read_text().replace("images/", "all/images/"))
    with pytest.raises(ValueError, match=r"'all/images/0\.png' is a symbolic link that leads out of"):
        table(tmp_path / "data").setup("fit")


def test_folders_of_links_are_data(tmp_path: Path) -> None:
    write_table(tmp_path / "pool")
    for number in range(6):
        link = tmp_path / "data" / "train" / "ab"[number % 2] / f"{number}.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / "pool" / "images" / f"{number}.png")
    data = ImageFolderDataModule(root=tmp_path / "data", image_size=8, batch_size=2, val_split=2, num_workers=0)
    data.setup("fit")
    assert data.class_names == ["a", "b"]
