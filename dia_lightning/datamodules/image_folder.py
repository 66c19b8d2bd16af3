"""Images in folders, one folder per class, as in ImageNet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from dia_lightning.datamodules._class_folders import (
    Folders,
    class_folders,
    files_of,
    match_folders,
    same_classes,
    warn_of_similar,
    warn_of_unknown_splits,
)
from dia_lightning.datamodules._image_files import folders_in, has_images, joined
from dia_lightning.datamodules._number_checks import check_whole
from dia_lightning.datamodules._spellings import Names, same_names
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.classification import ClassificationDataModule
from dia_lightning.datamodules.sources import FileSource, Source

NO_CLASSES = "images"
"""Name of the one class of images without class folders."""


class ImageFolderDataModule(ClassificationDataModule):
    """A folder ``root`` with ``train/CLASS/...``, ``val/CLASS/...`` and ``test/CLASS/...``.

    The classes are the folders in ``train``, sorted; ``val`` and ``test`` must have the same. Without ``val``, the
    split is drawn from ``train`` by ``val_split`` (or ``test`` is used if that is 0); without ``test``, as in ImageNet,
    the validation part is also the test set. Without ``train``, the classes are those of the checkpoint in use. Class
    folders of the splits may differ in Unicode form, case and spaces. Hidden names are skipped, and a warning counts
    other files that are not images. The basic recipe is ImageNet's: a random crop, resized to ``image_size``, and a
    flip; evaluation uses a centre crop.

    Images without classes, for unconditional diffusion, may be directly in ``train`` (and ``val``, ``test``), or in
    ``root`` itself if it has none of these folders. They all belong to one class, ``images``.

    Args:
        image_size: height and width in pixels that the network sees.
        resize_size: shorter side in pixels before the centre crop of evaluation. ``None`` means 8/7 of
            ``image_size``, which is ImageNet's 256 for 224.
        **common: as :class:`ClassificationDataModule` takes them.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, *, image_size: int = 224, resize_size: int | None = None, **common: Any) -> None:
        super().__init__(**common)
        check_whole("image_size", image_size, least=1)
        check_whole("resize_size", resize_size, least=1, optional=True)
        self.resize_size = round(image_size * 8 / 7) if resize_size is None else resize_size
        if self.resize_size < image_size:
            raise ValueError(f"resize_size must not be less than image_size={image_size}, got {resize_size}.")
        self.image_shape = (3, int(image_size), int(image_size))
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """Return the folders in ``root/train``, sorted; without ``root/train``, the classes of the checkpoint."""
        trained = self.trained_classes
        if trained is not None and ((folder := self._folder("train")) == self.root or not folder.is_dir()):
            return trained
        if self._class_names is None:
            self._class_names = list(self._class_folders("train"))
        # In the order and form of the checkpoint: a Mac spells, and so sorts, names differently.
        return trained if trained is not None and same_classes(trained, self._class_names) else self._class_names

    def load_split(self, split: Split) -> Source | None:
        """List the files of a split and check them against the classes of ``train``."""
        folder = self._folder(split)
        if split != "train" and not folder.is_dir():
            return None
        if split == "val" and self.val_split > 0:
            raise ValueError(f"val_split must be 0 beside {folder}, got {self.val_split}. Or move the folder.")
        if split == "train":
            warn_of_similar(self.class_names, folder)
            warn_of_unknown_splits(self.root)
        files = files_of(match_folders(self._class_folders(split), self.class_names, folder), folder)
        everything = joined(list(files.values()))
        labels = [label for label, found in enumerate(files.values()) for _ in found.paths]
        return FileSource(everything.paths, labels, channels=3, bit_depth=self.bit_depth, inodes=everything.inodes)

    def basic_augmentation(self) -> Sequence[v2.Transform]:
        """Crop 8 to 100 % of the image, with random aspect ratio, then flip half of the images."""
        return [v2.RandomResizedCrop(self.image_shape[1:]), v2.RandomHorizontalFlip()]

    def resizing(self) -> Sequence[v2.Transform]:
        """Resize the shorter side, then crop the centre."""
        return [v2.Resize(self.resize_size), v2.CenterCrop(self.image_shape[1:])]

    def state_dict(self) -> dict[str, Any]:
        """Return the class mapping too, so that a checkpoint knows what its outputs mean."""
        return {**super().state_dict(), "class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the class mapping of a checkpoint.

        Raises:
            ValueError: if ``root/train`` has different classes.
        """
        super().load_state_dict(state_dict)
        names, before = list(state_dict["class_names"]), self._class_names
        self.trained_classes = names
        if before is not None and not same_names(before, self.class_names):
            self._sources.clear()  # their labels have a different order
            self._samples.clear()
        if self.class_names != names:
            different = sorted(set(names) ^ set(self.class_names))
            raise ValueError(f"{self.root / 'train'} has other classes than the checkpoint: {', '.join(different)}.")

    def _no_split(self, split: Split) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.root} has neither test/CLASS/IMAGE nor val/CLASS/IMAGE. Add one, or set val_split=0.1, say, to "
            "validate and test on a part of train/."
        )

    def _folder(self, split: Split) -> Path:
        """Return the folder of a split; for ``train``, ``root`` itself if it has only images."""
        if not self.root.is_dir():
            return self.root / split
        there = Names(folders_in(self.root))
        alone = split == "train" and not any(there.find(name) for name in ("train", "val", "test"))
        return self.root if alone and has_images(self.root) else self.root / (there.find(split) or split)

    def _class_folders(self, split: Split) -> Folders:
        """Return the folders of every class; for images without classes, the folder of the split itself."""
        folder = self._folder(split)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder: expected {split}/CLASS/IMAGE in root={self.root}. It cannot be downloaded "
                "(root is the argument, else $DIA_DATA, else ~/.cache/dia_lightning)."
            )
        found = {} if folder == self.root else class_folders(folder)
        flat = not found and has_images(folder) and (split == "train" or self.class_names == [NO_CLASSES])
        if not found and not flat:
            raise FileNotFoundError(f"{folder} has no class folders: expected {split}/CLASS/IMAGE.")
        return {NO_CLASSES: [folder]} if flat else found
