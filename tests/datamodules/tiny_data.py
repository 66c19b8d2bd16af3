"""Writers of tiny data sets in the on-disk format of the real ones."""

import hashlib
import pickle
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

Pixels = npt.NDArray[np.uint8]


def pixels(*shape: int, seed: int = 0) -> Pixels:
    """Return random 8-bit values."""
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def labels_in_turn(count: int, classes: int) -> list[int]:
    """Return the labels 0, 1, ..., classes - 1, 0, 1, ..."""
    return [i % classes for i in range(count)]


def samples_of(loader: DataLoader[Any]) -> list[Any]:
    """Return the samples of a loader's dataset, in order and one by one."""
    dataset: Any = loader.dataset
    return [dataset[i] for i in range(len(dataset))]


def pretend_ranks(data: LightningDataModule, ranks: int, rank: int) -> None:
    """Make a data module believe that it is one of several processes of a run."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(
        world_size=ranks, global_rank=rank, num_devices=ranks, strategy=strategy, current_epoch=0
    )
    data.trainer = trainer


def warnings_of(data: LightningDataModule, stage: str = "fit") -> list[str]:
    """Open the splits of a stage and return what is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup(stage)
    return [str(warning.message) for warning in caught]


def _write(folder: Path, name: str, content: bytes) -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return name, hashlib.md5(content).hexdigest()


def write_cifar(
    root: Path, dataset: type[datasets.CIFAR10], patch: pytest.MonkeyPatch, *, train: int = 200, test: int = 100
) -> Path:
    """Write pickled batches under ``root`` and make torchvision expect their md5. Return their folder."""
    folder: Path = root / dataset.base_folder
    fine = dataset is datasets.CIFAR100
    classes = 100 if fine else 10
    names = datasets.CIFAR10.train_list if not fine else dataset.train_list

    def batch(name: str, count: int, seed: int) -> tuple[str, str]:
        content = {
            "data": pixels(count, 3072, seed=seed),
            "fine_labels" if fine else "labels": labels_in_turn(count, classes),
        }
        return _write(folder, name, pickle.dumps(content))

    train_list = [batch(name, train // len(names), seed) for seed, (name, _) in enumerate(names)]
    test_list = [batch(dataset.test_list[0][0], test, 99)]
    names_key = dataset.meta["key"]
    meta, md5 = _write(folder, dataset.meta["filename"], pickle.dumps({names_key: [str(i) for i in range(classes)]}))
    patch.setattr(dataset, "train_list", train_list)
    patch.setattr(dataset, "test_list", test_list)
    patch.setattr(dataset, "meta", {"filename": meta, "key": names_key, "md5": md5})
    return folder


def write_fashion_mnist(root: Path, *, train: int = 200, test: int = 100) -> Path:
    """Write the four idx files, unpacked. Return their folder."""
    folder = root / "FashionMNIST" / "raw"
    for part, count in (("train", train), ("t10k", test)):
        images, labels = pixels(count, 28, 28, seed=count), bytes(labels_in_turn(count, 10))
        _write(folder, f"{part}-images-idx3-ubyte", struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes())
        _write(folder, f"{part}-labels-idx1-ubyte", struct.pack(">II", 0x801, count) + labels)
    return folder


def write_stl10(root: Path, dataset: type[datasets.STL10], patch: pytest.MonkeyPatch) -> Path:
    """Write 40 training and 20 test images, but no unlabelled ones. Return their folder."""
    folder = root / "stl10_binary"
    lists = []
    for part, count in (("train", 40), ("test", 20)):
        images = pixels(count, 3, 96, 96, seed=count)  # the format is channel, column, row
        labels = bytes(label + 1 for label in labels_in_turn(count, 10))
        lists.append([_write(folder, f"{part}_X.bin", images.tobytes()), _write(folder, f"{part}_y.bin", labels)])
    patch.setattr(dataset, "train_list", lists[0])
    patch.setattr(dataset, "test_list", lists[1])
    return folder


def write_image_folder(
    root: Path, *, splits: tuple[str, ...] = ("train", "val", "test"), classes: tuple[str, ...] = ("ant", "bee", "cat")
) -> None:
    """Write 4 images of 40 x 30 per class and split."""
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(pixels(30, 40, 3, seed=i)).save(folder / f"{i}.png")
