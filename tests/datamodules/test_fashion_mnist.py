import gzip
import hashlib
from pathlib import Path

import pytest
import torch
from torchvision import datasets, transforms

from dia_lightning.datamodules import FashionMNISTDataModule
from tests.datamodules.tiny_data import samples_of, write_fashion_mnist


def _data(root: Path) -> FashionMNISTDataModule:
    return FashionMNISTDataModule(root=str(root), val_split=50, batch_size=16, num_workers=0, pin_memory=False)


def test_test_images_are_those_of_torchvision(tmp_path: Path, no_network: None) -> None:
    write_fashion_mnist(tmp_path)
    data = _data(tmp_path)
    data.prepare_data()
    data.setup("test")
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.2860,), (0.3530,))])
    reference = datasets.FashionMNIST(str(tmp_path), train=False, transform=steps)
    for image, label, index in samples_of(data.test_dataloader()):
        torch.testing.assert_close(image, reference[index][0])
        assert label == reference[index][1]


def test_archives_that_lie_there_packed_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    folder = write_fashion_mnist(tmp_path)
    resources = []
    for path in sorted(folder.iterdir()):
        packed = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(packed)
        path.unlink()
        resources.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    data = _data(tmp_path)
    data.prepare_data()
    data.setup("fit")
    assert len(samples_of(data.train_dataloader())) == 150


def test_damaged_file_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    path = write_fashion_mnist(tmp_path) / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FileNotFoundError, match=f"{path.parent}.*the test files are damaged"):
        _data(tmp_path).setup("test")


def test_missing_data_are_explained(tmp_path: Path, no_network: None) -> None:
    data = FashionMNISTDataModule(root=str(tmp_path), download=False)
    for act in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError, match=r"FashionMNIST.raw.*md5 .*\$DIA_FASHION_MNIST_URL"):
            act()


def test_every_archive_has_two_places_and_its_own_url() -> None:
    archives = FashionMNISTDataModule().archives()
    urls = [url for archive in archives for url in archive.urls]
    assert len(set(urls)) == 8
    assert all(url.endswith(archive.filename) for archive in archives for url in archive.urls)
