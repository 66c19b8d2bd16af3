"""Fashion-MNIST."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.transforms import v2

from dia_lightning.datamodules._download import Archive
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.classification import ClassificationDataModule
from dia_lightning.datamodules.sources import ArraySource, Source

_PLACES = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)


class FashionMNISTDataModule(ClassificationDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 10 kinds of clothes, 28x28 grey.

    The files are in ``root/FashionMNIST/raw``. By default 5,000 training images are for validation. The basic recipe is
    a crop after padding by 4 pixels and a flip. ``$DIA_FASHION_MNIST_URL``, a URL that ends with ``/``, is the folder
    that is tried first for the four archives.

    Args:
        val_split: samples for validation out of the training set: a number, or a fraction below 1; 0 validates on the
            test set.
        **common: as :class:`ClassificationDataModule` takes them.

    Source: https://github.com/zalandoresearch/fashion-mnist
    """

    mean = (0.2860,)
    std = (0.3530,)
    image_shape = (1, 28, 28)
    policy = v2.AutoAugmentPolicy.CIFAR10

    def __init__(self, *, val_split: int | float = 5000, **common: Any) -> None:
        super().__init__(val_split=val_split, **common)

    @property
    def class_names(self) -> list[str]:
        """Return the names in the data set's own order."""
        return list(datasets.FashionMNIST.classes)

    def load_split(self, split: Split) -> Source | None:
        """Read the unpacked files; there is no validation part."""
        if split == "val":
            return None
        if not self.is_complete():
            raise self._missing_data("files are missing")
        try:
            data = datasets.FashionMNIST(self.root, train=split == "train")
        except (AssertionError, RuntimeError, ValueError) as error:  # only the archives have a checksum, not the files
            raise self._missing_data(f"the {split} files are damaged, delete them") from error
        return ArraySource(data.data.numpy(), data.targets.numpy(), split=split, channels=1)

    def basic_augmentation(self) -> Sequence[v2.Transform]:
        """Crop after padding by 4 black pixels, then flip half of the images."""
        return [v2.RandomCrop(28, padding=4), v2.RandomHorizontalFlip()]

    def archives(self) -> Sequence[Archive]:
        """Return the four archives."""
        return [
            Archive(name, md5, tuple(place + name for place in _PLACES), "DIA_FASHION_MNIST_URL")
            for name, md5 in datasets.FashionMNIST.resources
        ]

    @property
    def archive_folder(self) -> Path:
        """Return the folder that torchvision uses."""
        return self.root / "FashionMNIST" / "raw"

    def is_complete(self) -> bool:
        """Return whether the four unpacked files exist."""
        return all((self.archive_folder / Path(name).stem).is_file() for name, _ in datasets.FashionMNIST.resources)
