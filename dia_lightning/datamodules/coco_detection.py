"""Images with boxes and masks in COCO's format."""

from pathlib import Path
from typing import Any

from dia_lightning.datamodules._coco_areas import plausible_areas
from dia_lightning.datamodules._coco_entries import find_pictures, tell_of_unlisted
from dia_lightning.datamodules._coco_file import CocoFile, read_coco
from dia_lightning.datamodules._coco_masks import decode_masks
from dia_lightning.datamodules._spellings import FileFinder, plain, same_names
from dia_lightning.datamodules.base import Split
from dia_lightning.datamodules.detection import DetectionDataModule
from dia_lightning.datamodules.sources import Source


class CocoDetectionDataModule(DetectionDataModule):
    """Images in folders and annotations in COCO's format; by default in the layout of COCO 2017.

    Labels 1..K are the categories of the training file in the order of their ids, which may have gaps or start at 0;
    the other files must have the same categories. Images without annotations are kept; several entries for one image
    file are merged, and impossible areas are not used, each with a warning. Files are checked completely when they are
    opened. Without ``val_annotations``, the validation part is drawn from the training set by ``val_split``; without
    ``test_annotations``, the validation part is also the test set. Without the training file, the classes are those of
    the checkpoint in use.

    Args:
        train_annotations: JSON file, relative to ``root``.
        train_images: folder that ``file_name`` in the training file is relative to, itself relative to ``root``. It may
            be a symbolic link; links in it that lead elsewhere are refused.
        val_annotations: JSON file for validation; ``None`` if there is none.
        val_images: folder of its images.
        test_annotations: JSON file for testing; ``None`` if there is none.
        test_images: folder of its images.
        masks: whether targets have masks; if so, every annotation must have a segmentation.
        **common: as :class:`DetectionDataModule` takes them.

    Source: https://cocodataset.org/#format-data
    """

    def __init__(
        self,
        *,
        train_annotations: str = "annotations/instances_train2017.json",
        train_images: str = "train2017",
        val_annotations: str | None = "annotations/instances_val2017.json",
        val_images: str | None = "val2017",
        test_annotations: str | None = None,
        test_images: str | None = None,
        masks: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if val_annotations is not None:
            self._refuse_val_split(f"val_annotations={val_annotations}")
        self._places: dict[Split, tuple[Path, Path]] = {}
        given: dict[Split, tuple[str | None, str | None]] = {
            "train": (train_annotations, train_images),
            "val": (val_annotations, val_images),
            "test": (test_annotations, test_images),
        }
        for split, (annotations, images) in given.items():
            if annotations is not None and images is None:
                raise ValueError(f"{split}_images must be the folder of the images of {annotations}, got None.")
            if annotations is not None and images is not None:
                self._places[split] = _spelled(self.root / annotations), _spelled(self.root / images)
        self.masks = masks
        self._files: dict[Split, CocoFile] = {}
        self._restored: dict[int, str] | None = None

    @property
    def class_names(self) -> list[str]:
        """Return the names of the categories, sorted by id."""
        categories = self._categories()
        if categories is not None:
            names = list(categories.values())
            trained = self.trained_classes
            return trained if trained is not None and same_names(trained, names) else names
        if self.trained_classes is None:
            raise self._missing("train")
        return self.trained_classes

    @property
    def category_ids(self) -> list[int] | None:
        """Return the ids of the categories; ``None`` if no file has them and a checkpoint gives only names."""
        categories = self._categories()
        return None if categories is None else list(categories)

    def load_split(self, split: Split) -> Source | None:
        """Read and check the annotations of a split, and look for its images."""
        if split not in self._places:
            return None
        file, folder = self._file(split), self._places[split][1]
        self._check_categories(file)
        pictures = find_pictures(file, folder)
        if all(images != folder for other, (_, images) in self._places.items() if other != split):
            tell_of_unlisted(file, pictures.paths)
        return self._annotated_files(
            split,
            plausible_areas(pictures.objects, file.path),
            paths=pictures.paths,
            sizes=pictures.sizes,
            where=file.path,
            image_ids=pictures.image_ids,
            decode=decode_masks,
            inodes=pictures.inodes,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the class mapping too, so that a checkpoint knows what its outputs mean."""
        return {**super().state_dict(), "class_names": self.class_names, "category_ids": self.category_ids}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the class mapping of a checkpoint.

        Raises:
            ValueError: if the annotation files have a different one.
        """
        super().load_state_dict(state_dict)
        self._restored = dict(zip(state_dict["category_ids"], state_dict["class_names"], strict=True))
        self.trained_classes = list(self._restored.values())
        if self._places["train"][0].is_file():
            self._file("train")
        for file in self._files.values():
            _check_same(file, self._restored, "the checkpoint")

    def _categories(self) -> dict[int, str] | None:
        """Return names by id: of the training file, else a checkpoint of this data, else another split."""
        if self._places["train"][0].is_file():
            return self._file("train").categories
        if self._restored is not None:
            return self._restored
        for split in ("val", "test"):
            if split in self._places and self._places[split][0].is_file():
                categories = self._file(split).categories
                if self.trained_classes is not None and same_names(list(categories.values()), self.trained_classes):
                    return categories
        return None

    def _check_categories(self, file: CocoFile) -> None:
        trained = self._places["train"][0]
        where = str(trained) if trained.is_file() else "the checkpoint"
        categories = self._categories()
        if categories is None:
            found, known = list(file.categories.values()), self.class_names
            if not same_names(found, known):
                raise ValueError(f"{file.path} has other categories than {where}: {found}, expected {known}.")
        else:
            _check_same(file, categories, where)

    def _file(self, split: Split) -> CocoFile:
        if split not in self._files:
            path = self._places[split][0]
            if not path.is_file():
                raise self._missing(split)
            self._files[split] = read_coco(path, masks=self.masks)
        return self._files[split]

    def _missing(self, split: Split) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self._places[split][0]} is not a file: expected annotations in COCO's format there (option "
            f"{split}_annotations, relative to root), and their images in {self._places[split][1]} ({split}_images). "
            f"The folder is root={self.root} (the argument, else $DIA_DATA, else ~/.cache/dia_lightning). COCO's own "
            "files are not downloaded from here: unpack the zip files of 2017 from https://cocodataset.org/#download."
        )


def _check_same(file: CocoFile, categories: dict[int, str], where: str) -> None:
    own, others = ({key: plain(name) for key, name in names.items()} for names in (file.categories, categories))
    if own != others:
        here, there = (sorted(a.items() - b.items()) for a, b in ((own, others), (others, own)))
        only = [f"{place} has {_named(pairs)}" for place, pairs in ((str(file.path), here), (where, there)) if pairs]
        raise ValueError(f"{file.path} has other categories than {where}: {', '.join(only)}.")


def _named(categories: list[tuple[int, str]]) -> str:
    return ", ".join(f"{number} {name}" for number, name in categories)


def _spelled(path: Path) -> Path:
    """Return a path as it is spelled on disk, if it exists."""
    return Path(FileFinder().find(str(path)) or path)
