"""STL-10, the labelled part."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torchvision import datasets
from torchvision.transforms import v2

from dia_lightning.datamodules._download import Archive, intact
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.classification import ClassificationDataModule
from dia_lightning.datamodules.sources import ArraySource, Source


class _Labelled(datasets.STL10):  # type: ignore[misc]
    # torchvision reads all 2.6 GB of unlabelled images every time, only to check them.
    train_list = datasets.STL10.train_list[:2]


class STL10DataModule(ClassificationDataModule):
    """STL-10: 5,000 training and 8,000 test images of 10 classes, 96x96 RGB, in ``root/stl10_binary``.

    By default 500 training images are for validation. The 100,000 unlabelled images are not used and may be deleted.
    The basic recipe is a crop after padding by 12 pixels and a flip. ``$DIA_STL10_URL`` is tried before the original.

    Args:
        val_split: samples for validation out of the training set: a number, or a fraction below 1; 0 validates on the
            test set.
        **common: as :class:`ClassificationDataModule` takes them.

    Source: https://cs.stanford.edu/~acoates/stl10/
    """

    mean = (0.4467, 0.4398, 0.4066)
    std = (0.2603, 0.2566, 0.2713)
    image_shape = (3, 96, 96)

    def __init__(self, *, val_split: int | float = 500, **common: Any) -> None:
        super().__init__(val_split=val_split, **common)

    @property
    def class_names(self) -> list[str]:
        """Return the names in the data set's own order."""
        return ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]

    def load_split(self, split: Split) -> Source | None:
        """Read a split after checking its md5; there is no validation part."""
        if split == "val":
            return None
        if not self.is_complete():
            raise self._missing_data("files are missing or damaged")
        data = _Labelled(self.root, split=split)
        return ArraySource(np.ascontiguousarray(data.data.transpose(0, 2, 3, 1)), data.labels, split=split, channels=3)

    def basic_augmentation(self) -> Sequence[v2.Transform]:
        """Crop after padding by 12 black pixels, then flip half of the images."""
        return [v2.RandomCrop(96, padding=12), v2.RandomHorizontalFlip()]

    def archives(self) -> Sequence[Archive]:
        """Return the archive of torchvision."""
        return [Archive(_Labelled.filename, _Labelled.tgz_md5, (_Labelled.url,), "DIA_STL10_URL")]

    def is_complete(self) -> bool:
        """Compare the md5 of the labelled files."""
        files = [(name, md5) for name, md5 in (*_Labelled.train_list, *_Labelled.test_list)]
        return intact(self.root / _Labelled.base_folder, files)
