import socket
from pathlib import Path
from typing import Any

import pytest
from torchvision import datasets

from dia_lightning.datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    ClassificationDataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    STL10DataModule,
    stl10,
)
from tests.datamodules import tiny_data

Kind = type[ClassificationDataModule]

ALL = [
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    STL10DataModule,
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every connection an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something connects to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=ALL, ids=lambda kind: str(kind.__name__))
def any_kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """Every concrete data module in turn, with a tiny data set for it in ``$DIA_DATA``."""
    monkeypatch.setenv("DIA_DATA", str(tmp_path))
    tiny_data.write_fashion_mnist(tmp_path, train=6000)
    tiny_data.write_image_folder(tmp_path)
    for dataset in (datasets.CIFAR10, datasets.CIFAR100):
        tiny_data.write_cifar(tmp_path, dataset, monkeypatch)
    tiny_data.write_stl10(tmp_path, stl10._Labelled, monkeypatch)
    kind: Kind = request.param
    return kind
