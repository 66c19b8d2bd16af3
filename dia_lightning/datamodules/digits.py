"""Handwritten digits that come with scikit-learn: real data without a download."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import v2

from dia_lightning.datamodules._number_checks import check_whole
from dia_lightning.datamodules._uci_digits import read_digits
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.classification import ClassificationDataModule
from dia_lightning.datamodules.sources import ArraySource, Source


class DigitsDataModule(ClassificationDataModule):
    """The 1,797 digits of the UCI "optical recognition of handwritten digits" test set, 8x8 grey, enlarged.

    With the default ``val_split``, 1,297 are for training, 250 for validation and 250 for testing. The basic recipe is
    small shifts and rotations, without flips.

    Args:
        image_size: height and width in pixels that the digits are enlarged to, 8 or more.
        channels: 1 for grey, 3 for networks that expect RGB.
        val_split: samples for validation out of the training set: a number, or a fraction below 1; 0 validates on the
            test set.
        **common: as :class:`ClassificationDataModule` takes them.

    Example:
        >>> data = DigitsDataModule(batch_size=16)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([16, 3, 32, 32]), 10)

    Source: https://doi.org/10.24432/C50P49
    """

    policy = v2.AutoAugmentPolicy.SVHN
    needs_no_workers = True

    def __init__(self, *, image_size: int = 32, channels: int = 3, val_split: int | float = 250, **common: Any) -> None:
        super().__init__(val_split=val_split, **common)
        check_whole("image_size", image_size, least=8)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}.")
        self.image_shape = (int(channels), int(image_size), int(image_size))
        self.mean = (0.3055,) * channels
        self.std = (0.3235,) * channels

    @property
    def class_names(self) -> list[str]:
        """Return the digits."""
        return [str(digit) for digit in range(10)]

    def load_split(self, split: Split) -> Source | None:
        """Enlarge the digits of a split; there is no validation part."""
        if split == "val":
            return None
        grey, labels = read_digits("test" if split == "test" else "train")
        size = self.image_shape[1:]
        images = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BILINEAR)) for x in grey])
        return ArraySource(images, labels, split=split, channels=self.image_shape[0])

    def basic_augmentation(self) -> Sequence[v2.Transform]:
        """Rotate by up to 10 degrees and shift by up to a sixteenth."""
        return [v2.RandomAffine(10, translate=(1 / 16, 1 / 16), interpolation=v2.InterpolationMode.BILINEAR)]
