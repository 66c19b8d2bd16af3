import hashlib
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import datasets, transforms

from dia_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule
from tests.datamodules.tiny_data import samples_of, write_cifar

Kind = type[CIFAR10DataModule] | type[CIFAR100DataModule]
both = pytest.mark.parametrize("kind", [CIFAR10DataModule, CIFAR100DataModule])

# What the authors' training script does, in torchvision's older classes
_TO_TENSOR = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
_AUTHORS = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *_TO_TENSOR])


def _data(kind: Kind, root: Path) -> CIFAR10DataModule | CIFAR100DataModule:
    return kind(root=str(root), batch_size=16, num_workers=0, pin_memory=False)


@both
def test_test_images_are_those_of_torchvision(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, kind.dataset, monkeypatch)
    data = _data(kind, tmp_path)
    data.setup("test")
    reference = kind.dataset(str(tmp_path), train=False, transform=transforms.Compose(_TO_TENSOR))
    assert len(samples_of(data.test_dataloader())) == len(reference) == 100
    for image, label, index in samples_of(data.test_dataloader()):
        torch.testing.assert_close(image, reference[index][0])
        assert label == reference[index][1]


@both
def test_training_recipe_is_the_authors(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, kind.dataset, monkeypatch)
    data = _data(kind, tmp_path)
    with pytest.warns(UserWarning, match="validating on the test set, so the best epoch is chosen by test accuracy"):
        data.setup("fit")
    reference = kind.dataset(str(tmp_path), train=True, transform=_AUTHORS)
    ours: Any = data.train_dataloader().dataset
    for index in range(50):
        torch.manual_seed(index)
        expected = reference[index]
        torch.manual_seed(index)
        image, label = ours[index]
        torch.testing.assert_close(image, expected[0])
        assert label == expected[1]


@both
def test_class_names_fit_the_number_of_classes(kind: Kind) -> None:
    names = kind().class_names
    assert len(set(names)) == len(names) == (10 if kind is CIFAR10DataModule else 100)
    assert names == sorted(names)  # both data sets number their classes in alphabetical order


@both
@pytest.mark.filterwarnings("ignore:val_split=0")
def test_nothing_connects_when_the_files_are_there(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    write_cifar(tmp_path, kind.dataset, monkeypatch)
    data = _data(kind, tmp_path)
    data.prepare_data()
    data.setup()


@both
def test_damaged_file_is_noticed(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar(tmp_path, kind.dataset, monkeypatch)
    name = kind.dataset.test_list[0][0]
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="missing or damaged"):
        _data(kind, tmp_path).setup("test")


@both
def test_missing_data_are_explained_in_one_line(kind: Kind, tmp_path: Path, no_network: None) -> None:
    data = kind(root=str(tmp_path), download=False)
    for act in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError) as error:
            act()
        message = str(error.value)
        for part in (str(tmp_path), kind.dataset.url, kind.dataset.tgz_md5, f"${kind.env}"):
            assert part in message
        assert "\n" not in message


@both
def test_archive_from_the_users_place_is_unpacked(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    folder = write_cifar(tmp_path, kind.dataset, monkeypatch)
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    monkeypatch.setattr(kind.dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv(kind.env, archive.as_uri())
    data = _data(kind, tmp_path / "root")
    data.prepare_data()
    data.setup("test")
    assert len(data.test_dataloader()) == 7


@both
def test_original_host_is_tried_last(kind: Kind) -> None:
    (archive,) = kind().archives()
    assert archive.urls[-1] == kind.dataset.url
    assert len(archive.urls) > 1
    assert (
        archive.md5
        == {
            datasets.CIFAR10: "c58f30108f718f92721af3b95e74349a",
            datasets.CIFAR100: "eb9058c3a382ffc7106e4002c42a8d85",
        }[kind.dataset]
    )
