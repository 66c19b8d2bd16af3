"""Handwritten digits on textured canvases: detection that learns within a minute, without a download."""

from typing import Any

from dia_lightning.datamodules._detection_transforms import DetectionAugment
from dia_lightning.datamodules._number_checks import check_whole
from dia_lightning.datamodules._sampling import stratified_split
from dia_lightning.datamodules._scenes import SceneSource
from dia_lightning.datamodules._uci_digits import read_digits
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.detection import DetectionDataModule
from dia_lightning.datamodules.sources import Source

_VAL_GLYPHS = 250
_SEEDS: dict[Split, int] = {"train": 0, "val": 1, "test": 2}  # fixed, unlike split_seed: scenes are always the same


class DigitScenesDataModule(DetectionDataModule):
    """Scenes of 1 to 5 real handwritten digits, each in its own colour, on textured backgrounds.

    The digits are the 8x8 ones of scikit-learn, enlarged to 20 to 48 pixels on a canvas of 128; training, validation
    and test scenes are made of different digits. Boxes are tight around the visible ink, and masks are that ink: later
    digits cover earlier ones, of which at least half stays visible. A scene depends only on its split, its number and
    ``image_size``: it is the same in every run, and a larger split begins with the scenes of a smaller one.

    Args:
        image_size: height and width of a scene in pixels, 64 or more.
        train_size: number of training scenes.
        val_size: number of validation scenes.
        test_size: number of test scenes.
        masks: whether targets have masks.
        augment: as :class:`DetectionDataModule` takes it; none by default, because mirrored digits are not digits.
        **common: as :class:`DetectionDataModule` takes them.

    Example:
        >>> data = DigitScenesDataModule(train_size=8)
        >>> data.setup("fit")
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> len(images), images[0].shape, sorted(targets[0])
        (4, torch.Size([3, 128, 128]), ['boxes', 'labels'])

    Source of the digits: https://doi.org/10.24432/C50P49
    """

    needs_no_workers = True

    def __init__(
        self,
        *,
        image_size: int = 128,
        train_size: int = 400,
        val_size: int = 60,
        test_size: int = 100,
        masks: bool = False,
        augment: DetectionAugment = "none",
        **common: Any,
    ) -> None:
        super().__init__(augment=augment, **common)
        check_whole("image_size", image_size, least=64)
        sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for split, count in sizes.items():
            check_whole(f"{split}_size", count, least=1)
        self._refuse_val_split("the scenes for validation, see val_size")
        self.image_size = int(image_size)
        self.masks = masks
        self._counts = sizes

    @property
    def class_names(self) -> list[str]:
        """Return the digits."""
        return [str(digit) for digit in range(10)]

    def load_split(self, split: Split) -> Source:
        """Read the digits that a split is made of."""
        glyphs, digits = read_digits("test" if split == "test" else "train")
        if split != "test":
            chosen = stratified_split(digits, _VAL_GLYPHS, seed=42)[0 if split == "train" else 1]
            glyphs, digits = glyphs[chosen], digits[chosen]
        return SceneSource(
            glyphs,
            digits,
            count=self._counts[split],
            size=self.image_size,
            seed=_SEEDS[split],
            split=split,
            masks=self.masks,
        )
