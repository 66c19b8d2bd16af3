"""Images in folders, one folder per class, as ImageNet is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from dia_lightning.datamodules._images import list_images
from dia_lightning.datamodules._options import check_whole
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.classification import ClassificationDataModule
from dia_lightning.datamodules.sources import FileSource, Source


class ImageFolderDataModule(ClassificationDataModule):
    """A folder ``root`` with ``train/CLASS/...``, ``val/CLASS/...`` and ``test/CLASS/...``.

    The classes are the folders in ``train``, sorted; ``val`` and ``test`` must have the same. Without ``val`` the split
    is drawn from ``train`` by ``val_split`` (or ``test`` is used, if that is 0); without ``test``, as in ImageNet,
    the validation part is tested on. Without ``train`` the classes are those of the checkpoint that is used. Names that
    start with a dot are ignored. The basic recipe is ImageNet's: a random part of the image, brought to ``image_size``,
    and a flip; evaluation takes the middle.

    Args:
        image_size: height and width in pixels that the network sees.
        resize_size: shorter side in pixels from which evaluation cuts the middle. ``None`` means 8/7 of
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
        """Return the folders in ``root/train``, sorted; without ``root/train`` the classes of the checkpoint."""
        if self.trained_classes is not None and not (self.root / "train").is_dir():
            return self.trained_classes
        if self._class_names is None:
            self._class_names = self._classes_in("train")
        return self._class_names

    def load_split(self, split: Split) -> Source | None:
        """List the files of a split and check them against the classes of ``train``."""
        if split == "val" and not (self.root / "val").is_dir():
            return None
        if split == "val" and self.val_split > 0:
            raise ValueError(
                f"val_split must be 0 beside {self.root / 'val'}, got {self.val_split}. Or move the folder."
            )
        if split == "test" and not (self.root / "test").is_dir():
            return None
        self._check_classes(split)
        files = [list_images(self.root / split / name) for name in self.class_names]
        empty = [name for name, paths in zip(self.class_names, files, strict=True) if not paths]
        if empty:
            raise FileNotFoundError(f"No image in class folder(s) {', '.join(empty)} of {self.root / split}.")
        labels = [label for label, paths in enumerate(files) for _ in paths]
        return FileSource([path for paths in files for path in paths], labels, channels=3)

    def basic_augmentation(self) -> Sequence[v2.Transform]:
        """Take 8 to 100 % of the image, of random aspect, then flip every second image."""
        return [v2.RandomResizedCrop(self.image_shape[1:]), v2.RandomHorizontalFlip()]

    def resizing(self) -> Sequence[v2.Transform]:
        """Resize the shorter side, then take the middle."""
        return [v2.Resize(self.resize_size), v2.CenterCrop(self.image_shape[1:])]

    def state_dict(self) -> dict[str, Any]:
        """Return the class mapping, so that a checkpoint knows what its outputs mean."""
        return {"class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the class mapping of a checkpoint.

        Raises:
            ValueError: if ``root/train`` has other classes.
        """
        self.trained_classes = names = list(state_dict["class_names"])
        if self.class_names != names:
            different = sorted(set(names) ^ set(self.class_names))
            raise ValueError(f"{self.root / 'train'} has other classes than the checkpoint: {', '.join(different)}.")

    def _no_split(self, split: Split) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.root} has neither test/CLASS/IMAGE nor val/CLASS/IMAGE. Add one, or set val_split=0.1, say, to "
            "validate and test on a part of train/."
        )

    def _classes_in(self, split: str) -> list[str]:
        folder: Path = self.root / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder: expected {split}/CLASS/IMAGE in root={self.root}. It cannot be downloaded "
                "(root is the argument, else $DIA_DATA, else ~/.cache/dia_lightning)."
            )
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise FileNotFoundError(f"{folder} has no class folders: expected {split}/CLASS/IMAGE.")
        return names

    def _check_classes(self, split: str) -> None:
        found = self._classes_in(split)
        unknown = sorted(set(found) - set(self.class_names))
        if unknown:
            raise ValueError(f"{self.root / split} has class(es) that training did not have: {', '.join(unknown)}.")
        missing = sorted(set(self.class_names) - set(found))
        if missing:
            raise ValueError(f"{self.root / split} lacks class(es) that training had: {', '.join(missing)}.")
