"""PASCAL VOC, and data in its layout."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torchvision.datasets.voc import DATASET_YEAR_DICT

from dia_lightning._choices import check_choice
from dia_lightning.datamodules._download import Archive
from dia_lightning.datamodules._image_files import inode
from dia_lightning.datamodules._voc_files import read_voc
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.detection import DetectionDataModule
from dia_lightning.datamodules.sources import Source

Year = Literal["2007", "2012"]

_FOLDERS = ("Annotations", "ImageSets/Main", "JPEGImages")
_MIRROR = "https://pjreddie.com/media/files/"


class VOCDetectionDataModule(DetectionDataModule):
    """PASCAL VOC 2007 or 2012: 20 classes, in ``root/VOCdevkit/VOC2012`` (or ``VOC2007``).

    The splits are those of ``ImageSets/Main``: train, val and test. 2012 has 5,717 and 5,823 images and no annotations
    for its test set, so it is tested on its validation set; 2007 has 2,501, 2,510 and 4,952. Your own data may have
    the folders ``Annotations``, ``ImageSets/Main`` and ``JPEGImages`` directly in ``root``. Objects marked
    ``difficult`` are not used in training, and have ``iscrowd`` 1 in evaluation, so they are neither hits nor misses.
    VOC's own evaluation does the same, but COCO's also forgives detections of a small part of such an object, so scores
    differ slightly. ``$DIA_VOC_URL`` is tried before the original.

    Args:
        year: ``"2007"`` or ``"2012"``.
        classes: names of the classes, in the order of the labels; ``None`` for the 20 of VOC.
        **common: as :class:`DetectionDataModule` takes them.

    Source: http://host.robots.ox.ac.uk/pascal/VOC/
    """

    def __init__(self, *, year: Year = "2012", classes: list[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        check_choice("year", year, get_args(Year))
        if classes is not None and (not classes or len(set(classes)) < len(classes)):
            raise ValueError(f"classes must be names, each once, or None for the 20 of VOC, got {classes!r}.")
        self._refuse_val_split("ImageSets/Main/val.txt")
        self.year = year
        self.classes = list(VOC_CLASSES if classes is None else classes)

    @property
    def class_names(self) -> list[str]:
        """Return the names in the data set's own order, or those that were given."""
        return self.classes

    @property
    def folder(self) -> Path:
        """Return the folder that has ``Annotations``, ``ImageSets`` and ``JPEGImages``."""
        return self.root if _is_voc(self.root) else self.root / "VOCdevkit" / f"VOC{self.year}"

    def load_split(self, split: Split) -> Source | None:
        """Read and check the annotations of a split, and look for its images."""
        if not _is_voc(self.folder):
            raise self._missing_data("download=False or prepare_data not called")
        names = self.folder / "ImageSets" / "Main" / f"{split}.txt"
        if split == "test" and not names.is_file():
            return None
        paths, sizes, objects = read_voc(self.folder, names, self.classes)
        inodes = [inode(os.stat(path)) for path in paths]
        return self._annotated_files(split, objects, paths=paths, sizes=sizes, where=names, inodes=inodes)

    def archives(self) -> Sequence[Archive]:
        """Return the archives of the year that are not unpacked yet."""
        splits: dict[str, str] = {self.year: "train"}
        if self.year == "2007" and self.download:  # otherwise training needs no test images
            splits["2007-test"] = "test"
        missing = [key for key, split in splits.items() if not self._has(split)]
        return [_archive(DATASET_YEAR_DICT[key]) for key in missing]

    def is_complete(self) -> bool:
        """Return whether the lists of all splits exist; nothing is ever added to your own data."""
        return _is_voc(self.root) or not self.archives()

    def _has(self, split: str) -> bool:
        return _is_voc(self.folder) and (self.folder / "ImageSets" / "Main" / f"{split}.txt").is_file()


def _is_voc(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in _FOLDERS)


def _archive(entry: dict[str, str]) -> Archive:
    name = entry["filename"]
    return Archive(name, entry["md5"], (_MIRROR + name, entry["url"]), "DIA_VOC_URL")


VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
