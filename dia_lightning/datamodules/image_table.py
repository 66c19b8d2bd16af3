"""Images that a CSV file lists with their labels."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dia_lightning._text import read_text
from dia_lightning.datamodules._image_files import inode
from dia_lightning.datamodules._sampling import ClassificationSamples, Positions, Role
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.image_folder import ImageFolderDataModule
from dia_lightning.datamodules.sources import FileSource, Source


class ImageTableDataModule(ImageFolderDataModule):
    """A folder ``root`` with ``train.csv`` and, if there are, ``val.csv`` and ``test.csv``, and the images they list.

    The first line of a table has names of columns; the first column has image files below ``root``. One more column
    has the class of each image by name, which makes batches like those of :class:`ImageFolderDataModule`. Several more
    columns are labels, 1 where an image has the label and 0 where not, for ``ClassificationTask(task="multilabel")``:
    labels of batches are then ``[B, K]`` float32, and for ``val_split`` and ``limit`` an image belongs to the rarest of
    its labels.

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
            self._class_names = columns if len(columns) > 1 else sorted({row[1] for row in rows})
        return self._class_names

    def load_split(self, split: Split) -> Source | None:
        """Read the table of a split and check it against the classes of training."""
        table = self._table(split)
        if split != "train" and not table.is_file():
            return None
        if split == "val" and self.val_split > 0:
            raise ValueError(f"val_split must be 0 beside {table}, got {self.val_split}. Or move the file.")
        columns, rows = _read(table)
        paths = [str(self.root / row[0]) for row in rows]
        for line, path in enumerate(paths, 2):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{table}, line {line}: there is no file {path}.")
        inodes = [inode(os.stat(path)) for path in paths]
        if len(columns) > 1:
            if columns != self.class_names:
                raise ValueError(f"{table} must have the label columns {self.class_names} of training, got {columns}.")
            return TableSource(paths, _zeros_and_ones(table, rows), bit_depth=self.bit_depth, inodes=inodes)
        unknown = sorted({row[1] for row in rows} - set(self.class_names))
        if unknown:
            raise ValueError(f"{table} has class(es) that training did not have: {', '.join(unknown)}.")
        labels = [self.class_names.index(row[1]) for row in rows]
        return FileSource(paths, labels, channels=3, bit_depth=self.bit_depth, inodes=inodes)

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
        bit_depth: as :class:`FileSource` takes it.
        inodes: as :class:`FileSource` takes them.
    """

    def __init__(
        self, paths: list[str], targets: npt.NDArray[np.float32], *, bit_depth: int, inodes: list[int]
    ) -> None:
        self.targets = targets
        images = targets.sum(0)
        rarity = np.where(targets > 0, images, len(targets) + 1)
        rarest = np.where(targets.any(1), rarity.argmin(1), targets.shape[1])
        super().__init__(paths, rarest.tolist(), channels=3, bit_depth=bit_depth, inodes=inodes)


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


def _read(table: Path) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns after the first, and all rows."""
    if not table.is_file():
        raise FileNotFoundError(
            f"There is no file {table}: expected a table of images with the columns file,label in root={table.parent}."
        )
    lines = csv.reader(io.StringIO(read_text(table), newline=""))
    header, *rows = [[cell.strip() for cell in row] for row in lines if row] or [[]]
    if len(header) < 2 or len(set(header)) < len(header) or not rows:
        raise ValueError(
            f"{table} must begin with the names of different columns, file,label or file,label1,label2,..., and have "
            f"a line per image; it begins with {','.join(header)!r} and has {len(rows)} more line(s)."
        )
    for line, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{table}, line {line}: {len(row)} values for {len(header)} columns.")
        if not all(row):
            raise ValueError(f"{table}, line {line}: a value is empty. Give the file, and a class name or 0 and 1.")
        if os.path.isabs(row[0]) or os.path.normpath(row[0]).startswith(".."):
            raise ValueError(f"{table}, line {line}: {row[0]!r} is not below {table.parent}. Give paths from there.")
    return header[1:], rows


def _zeros_and_ones(table: Path, rows: list[list[str]]) -> npt.NDArray[np.float32]:
    for line, row in enumerate(rows, 2):
        wrong = [value for value in row[1:] if value not in ("0", "1")]
        if wrong:
            raise ValueError(f"{table}, line {line}: labels of several columns must be 0 or 1, got {wrong[0]!r}.")
    return np.array([row[1:] for row in rows]).astype(np.float32)
