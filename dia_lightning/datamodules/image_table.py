"""Images listed with their labels in a CSV file."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dia_lightning._text import read_text
from dia_lightning.datamodules._class_folders import warn_of_similar
from dia_lightning.datamodules._enclosure import Enclosure
from dia_lightning.datamodules._image_files import inode
from dia_lightning.datamodules._sampling import ClassificationSamples, Positions, Role
from dia_lightning.datamodules._spellings import FileFinder, plain
from dia_lightning.datamodules._split_warnings import named
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.image_folder import ImageFolderDataModule
from dia_lightning.datamodules.sources import FileSource, Source


class ImageTableDataModule(ImageFolderDataModule):
    """A folder ``root`` with ``train.csv``, optionally ``val.csv`` and ``test.csv``, and the images they list.

    The first line of a table names the columns; the first column has image files below ``root``. If there is one other
    column, it has the class name of each image, and batches are like those of :class:`ImageFolderDataModule`. Several
    other columns are labels, 1 if an image has the label and 0 if not, for ``ClassificationTask(task="multilabel")``:
    labels of batches are then ``[B, K]`` float32, and for ``val_split`` and ``limit`` an image belongs to the rarest of
    its labels. Columns are separated by commas, semicolons or tabs; paths may be those of another system. They lead
    to files in ``root``: folders directly in it may be symbolic links, other links that lead elsewhere are refused.

    Args:
        **options: as :class:`ImageFolderDataModule` takes them.
    """

    @property
    def class_names(self) -> list[str]:
        """Return the names of the label columns, or the sorted classes in ``train.csv``; else the checkpoint's."""
        if self.trained_classes is not None and not self._table("train").is_file():
            return self.trained_classes
        if self._class_names is None:
            columns, rows = _read(self._table("train"))
            self._class_names = columns if len(columns) > 1 else sorted({row.labels[0] for row in rows})
        return self._class_names

    def load_split(self, split: Split) -> Source | None:
        """Read the table of a split and check it against the classes of training."""
        table = self._table(split)
        if split != "train" and not table.is_file():
            return None
        if split == "val" and self.val_split > 0:
            raise ValueError(f"val_split must be 0 beside {table}, got {self.val_split}. Or move the file.")
        columns, rows = _read(table)
        paths, inodes = _find(table, rows)
        if split == "train":
            warn_of_similar(self.class_names, table)
        more: dict[str, Any] = {"bit_depth": self.bit_depth, "inodes": inodes}
        if len(columns) > 1:
            if columns != self.class_names:
                raise ValueError(f"{table} must have the label columns {self.class_names} of training, got {columns}.")
            _warn_of_contradictions(table, paths, inodes, rows)
            return TableSource(paths, _zeros_and_ones(table, rows), **more)
        unknown = sorted({row.labels[0] for row in rows} - set(self.class_names))
        if unknown:
            raise ValueError(f"{table} has class(es) that training did not have: {', '.join(unknown)}.")
        _warn_of_contradictions(table, paths, inodes, rows)
        return FileSource(paths, [self.class_names.index(row.labels[0]) for row in rows], channels=3, **more)

    def make_samples(self, source: Source, positions: Positions, *, role: Role) -> ClassificationSamples:
        """Return normalised tensors, augmented for training, with a class index or several labels."""
        samples = super().make_samples(source, positions, role=role)
        if not isinstance(source, TableSource):
            return samples
        return MultilabelSamples(source, positions, transform=samples._transform, role=role)

    def _table(self, split: str) -> Path:
        return self.root / f"{split}.csv"

    def _no_split(self, split: Split) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.root} has neither test.csv nor val.csv. Add one, or set val_split=0.1, say, to validate and test "
            "on a part of train.csv."
        )


class TableSource(FileSource):
    """Image files with several labels each.

    Args:
        paths: the files.
        targets: 0 and 1 ``[N, K]``.
        **more: as :class:`FileSource` takes them.
    """

    def __init__(self, paths: list[str], targets: npt.NDArray[np.float32], **more: Any) -> None:
        self.targets = targets
        images = targets.sum(0)
        rarity = np.where(targets > 0, images, len(targets) + 1)
        rarest = np.where(targets.any(1), rarity.argmin(1), targets.shape[1])
        super().__init__(paths, rarest.tolist(), channels=3, **more)


class MultilabelSamples(ClassificationSamples):
    """Images ``[C, H, W]`` and labels ``[K]``."""

    _source: TableSource

    def load(self, position: int) -> tuple[Tensor, Any]:
        """Return the transformed image and its labels."""
        return super().load(position)[0], torch.from_numpy(self._source.targets[position])

    @property
    def labels(self) -> npt.NDArray[Any]:
        """Return the labels of every sample ``[N, K]``."""
        return self._source.targets[self._positions]

    def classes(self) -> set[int]:
        """Return which labels at least one sample has."""
        return set(np.flatnonzero(self.labels.any(0)).tolist())


@dataclass(frozen=True)
class _Row:
    line: int
    file: str
    labels: list[str]


def _read(table: Path) -> tuple[list[str], list[_Row]]:
    """Return the names of the columns after the first, and all rows."""
    if not table.is_file():
        raise FileNotFoundError(
            f"There is no file {table}: expected a table of images with the columns file,label in root={table.parent}."
        )
    text = read_text(table)
    mark = next((mark for mark in ",;\t" if mark in text.partition("\n")[0]), ",")
    reader = csv.reader(text.splitlines(keepends=True), delimiter=mark)
    cells = [(reader.line_num, [plain(cell.strip()) for cell in row]) for row in reader if any(row)]
    header = cells[0][1] if cells else []
    if len(header) < 2 or len(set(header)) < len(header) or len(cells) < 2:
        raise ValueError(
            f"{table} must begin with the names of different columns, file,label or file,label1,label2,..., and have "
            f"a line per image; it begins with {','.join(header)!r} and has {max(0, len(cells) - 1)} more line(s)."
        )
    for line, row in cells[1:]:
        if len(row) != len(header):
            raise ValueError(f"{table}, line {line}: {len(row)} values for {len(header)} columns.")
        if not all(row):
            raise ValueError(f"{table}, line {line}: a value is empty. Give the file, and a class name or 0 and 1.")
    return header[1:], [_Row(line, row[0], row[1:]) for line, row in cells[1:]]


def _find(table: Path, rows: list[_Row]) -> tuple[list[str], list[int]]:
    """Return the files of all rows, as spelled on disk, and their inodes."""
    finder, root = FileFinder(), str(table.parent)
    paths: list[str] = []
    enclosures: dict[str, Enclosure] = {}
    for row in rows:
        here = os.path.normpath(row.file.replace("\\", "/"))  # as written on another system
        if os.path.isabs(here) or here.split(os.sep)[0] == os.pardir:
            raise ValueError(f"{table}, line {row.line}: {row.file!r} is not below {root}. Give paths from there.")
        place = os.path.join(root, row.file)
        found = finder.find(place) or finder.find(os.path.join(root, here))
        if found is None or not os.path.isfile(found):
            raise FileNotFoundError(f"{table}, line {row.line}: there is no file {place}.")
        top = os.path.join(root, os.path.relpath(found, root).split(os.sep)[0])
        if not enclosures.setdefault(top, Enclosure(top if os.path.isdir(top) else root)).has(found):
            raise ValueError(
                f"{table}, line {row.line}: {row.file!r} is a symbolic link that leads out of {root}. Put the file in "
                "its place; a folder of files directly in root may be a link."
            )
        paths.append(found)
    return paths, [inode(os.stat(path)) for path in paths]


def _warn_of_contradictions(table: Path, paths: list[str], inodes: list[int], rows: list[_Row]) -> None:
    """Warn of images that are listed several times with different labels."""
    labels: dict[int, list[str]] = {}
    entries = zip(paths, inodes, rows, strict=True)
    several = [path for path, number, row in entries if labels.setdefault(number, row.labels) != row.labels]
    if several:
        rank_zero_warn(
            f"{table} lists {len(set(several))} image(s) with different labels in several lines "
            f"({named(sorted(set(several)))}): every line is a sample. For several labels per image give them columns."
        )


def _zeros_and_ones(table: Path, rows: list[_Row]) -> npt.NDArray[np.float32]:
    values = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
    for row in rows:
        if wrong := [value for value in row.labels if value not in values]:
            raise ValueError(f"{table}, line {row.line}: labels of several columns must be 0 or 1, got {wrong[0]!r}.")
    return np.array([[values[value] for value in row.labels] for row in rows]).astype(np.float32)
