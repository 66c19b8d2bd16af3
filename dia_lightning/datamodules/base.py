"""The one data API: what every data module of this package takes, offers and passes to the trainer."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch.utils.data import DataLoader, DistributedSampler

from dia_lightning._checkpoint_file import read_checkpoint
from dia_lightning._hyperparameters import arguments_of, primitive
from dia_lightning.datamodules._download import Archive, obtain
from dia_lightning.datamodules._draws import DrawnCollate, loader_generator
from dia_lightning.datamodules._image_files import images_at, joined
from dia_lightning.datamodules._loader_processes import (
    WORKER_TIMEOUT,
    automatic_workers,
    begin_worker,
    replicas,
    runs_on_cuda,
    silence_worker_advice,
)
from dia_lightning.datamodules._number_checks import check_val_split, check_whole
from dia_lightning.datamodules._resume_place import PlacedData
from dia_lightning.datamodules._sampling import (
    PaddedSampler,
    Positions,
    Role,
    Samples,
    balanced_subset,
    stratified_split,
)
from dia_lightning.datamodules._split_warnings import (
    warn_of_files_left_out,
    warn_of_shared_files,
    warn_of_untrained_classes,
    warn_of_unused_depth,
)
from dia_lightning.datamodules._worker_notes import NamingLoader, WorkerNotes, add_to_message
from dia_lightning.datamodules.sources import FileSource, Source

Split = Literal["train", "val", "test"]
_Loaded = Literal["train", "val", "test", "predict"]

_STAGES: dict[str | None, tuple[_Loaded, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}
Data = TypeVar("Data", bound="DIADataModule")
_NAMES = {"val": "validation", "test": "test"}
_ROLES: dict[_Loaded, Role] = {"train": "train", "val": "eval", "test": "eval", "predict": "predict"}


class DIADataModule(PlacedData, ABC):
    """Base of all data modules: options, splits and loaders, for any kind of label.

    Training batches are ``(images, labels)``, validation and test batches ``(images, labels, index [B] int64)``, and
    prediction batches ``(images, index)``. ``index`` is the position in the split, or -1 for a sample that only pads
    the last batches of a distributed run and must not be counted.

    There is a base class per kind of label, :class:`ClassificationDataModule` and :class:`DetectionDataModule`, which
    implements :meth:`make_samples`. A data set derives from it and implements :attr:`class_names` and
    :meth:`load_split`; if it can be downloaded, also :meth:`archives` and :meth:`is_complete`. If the classes are read
    from the data, ``trained_classes`` stands in for missing data: the command line sets it to the class names of a
    checkpoint before the network is built.

    Args:
        root: folder of the data. ``None`` means ``$DIA_DATA``, or ``~/.cache/dia_lightning`` if that is not set.
        batch_size: training samples per step and process.
        eval_batch_size: samples per validation, test and prediction step and process. ``None`` means ``batch_size``.
        num_workers: loader processes per loader. ``None`` means up to 4, depending on the CPUs; 0 for tiny sets.
        pin_memory: copy batches to page-locked memory. ``None`` means only if a CUDA device is used.
        val_split: part of the training set to validate on: a number of samples, or a fraction below 1. It is drawn per
            class. 0 validates on the test set if the data set has no validation part.
        split_seed: seed of every choice of samples (``val_split``, ``limit``).
        drop_last: drop the last, smaller training batch. Evaluation always sees every sample.
        limit: use only this many samples of every split, chosen evenly over the classes. For smoke runs.
        download: download the data if they are not in ``root``. Otherwise nothing ever connects to the network.
        predict_folder: predict the images in this folder and its subfolders, instead of the test set. It may also be
            one image, or a list of images and folders.
        bit_depth: how many bits 16-bit grey image files use, from 1 to 16: 12, as for many microscopes, makes 4095
            white. 8-bit files do not change. A warning reports files that use fewer.

    Raises:
        ValueError: if an option is of the wrong type or out of its range.
    """

    trained_classes: list[str] | None = None
    needs_no_workers: ClassVar[bool] = False  # so small that loader processes cost more than they save

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        val_split: int | float = 0,
        split_seed: int = 42,
        drop_last: bool = True,
        limit: int | None = None,
        download: bool = True,
        predict_folder: list[str] | str | Path | None = None,
        bit_depth: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        for name, value in self.hparams.items():
            self.hparams[name] = primitive(value)
        check_whole("batch_size", batch_size, least=1)
        check_whole("eval_batch_size", eval_batch_size, least=1, optional=True)
        check_whole("num_workers", num_workers, least=0, optional=True)
        check_whole("limit", limit, least=1, optional=True)
        check_whole("split_seed", split_seed, least=0)
        check_whole("bit_depth", bit_depth, least=1, most=16)
        check_val_split(val_split)
        self.root = Path(root if root is not None else _default_root()).expanduser()
        # not read from hparams, which hold the subclass's arguments; it may pass on other values
        self.batch_size = int(batch_size)  # the batch size finder writes here
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.val_split = val_split
        self.split_seed = split_seed
        self.drop_last = drop_last
        self.limit = limit
        self.download = download
        self.predict_folder = predict_folder
        self.bit_depth = bit_depth
        self._sources: dict[Split, Source | None] = {}
        self._samples: dict[_Loaded, Samples] = {}

    # What a data set defines

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Return the names of the classes, in the order of the labels."""

    @abstractmethod
    def load_split(self, split: Split) -> Source | None:
        """Open one split.

        Returns:
            The split; ``None`` for ``"val"`` or ``"test"`` if the data set has no such part.
        """

    @abstractmethod
    def make_samples(self, source: Source, positions: Positions, *, role: Role) -> Samples:
        """Return the dataset of the chosen positions of a split, transformed for its role."""

    def collate_function(self, role: Role) -> Callable[[list[Any]], Any] | None:
        """Return the function that collates samples into a batch; ``None`` stacks them."""
        return None

    def training_sampler(self, dataset: Samples) -> DistributedSampler[Any] | None:
        """Return the sampler for the training samples of this process; ``None`` shuffles them.

        With one that is not a ``DrawingSampler``, augmentation uses the random numbers of the process, and a resumed
        training restarts its epoch.
        """
        return None

    def archives(self) -> Sequence[Archive]:
        """Return the archives to download; empty if there are none."""
        return ()

    @property
    def archive_folder(self) -> Path:
        """Return the folder in which the archives are kept and unpacked."""
        return self.root

    def is_complete(self) -> bool:
        """Return whether the unpacked files are complete and intact."""
        return True

    @property
    def image_channels(self) -> int:
        """Return 1 if images are grey, 3 if they are RGB."""
        return 3

    # For all callers

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    def sample_name(self, index: int) -> str:
        """Return the file of a sample of the prediction set, or ``"split/position"`` if there are no files."""
        return self._dataset("predict").name(index)

    # Lightning's hooks

    @_restricted_classmethod
    def load_from_checkpoint(
        cls: type[Data],  # noqa: N805  # Lightning has its own decorator
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Data:
        """Build the data module of a checkpoint without running code from it or importing its classes.

        Args:
            checkpoint_path: a path, or a file open for reading bytes.
            map_location: as ``torch.load`` takes it.
            hparams_file: ignored.
            weights_only: always ``True``.
            **kwargs: options that override those in the checkpoint; objects must be given again.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else, code, or options that do not fit.
        """
        content, source = read_checkpoint(
            checkpoint_path, map_location, hparams_file=hparams_file, weights_only=weights_only
        )
        arguments = arguments_of(cls, content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}), kwargs, source)
        try:
            data = cls(**arguments)
        except TypeError as error:  # values of other types fail in many ways
            raise ValueError(f"The hyper-parameters of {source} do not fit {cls.__name__}: {error}.") from error
        if cls.__qualname__ in content:
            data.load_state_dict(content[cls.__qualname__])
        return data

    def prepare_data(self) -> None:
        """Download and unpack what is missing; does not connect if everything is there."""
        if self.is_complete():
            return
        for archive in self.archives():
            obtain(archive, self.archive_folder, download=self.download)
        if not self.is_complete():
            raise self._missing_data("the unpacked files are damaged")

    def setup(self, stage: str | None = None) -> None:
        """Open the splits of a stage, each only once.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"``, or ``None`` for all.

        Raises:
            ValueError: if the stage is unknown, or the training set is smaller than a batch.
            FileNotFoundError: if there are no such data.
        """
        if stage not in _STAGES:
            raise ValueError(f"stage must be fit, validate, test, predict or None, got {stage!r}.")
        if stage == "fit":
            self._place = None  # left by an earlier fit
        for name in _STAGES[stage]:
            self._dataset(name)
        if "train" in _STAGES[stage]:
            self._check_train_size()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training batches.

        The order depends only on the seed and the epoch, and the augmentation of a sample also on its place in it,
        regardless of the number of workers. A resumed training starts after the last batch of its checkpoint.
        """
        self._check_train_size()
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of the folder to predict, or of the test set, in order."""
        return self._loader("predict")

    def on_exception(self, exception: BaseException) -> None:
        """Name the samples at which a loader's process died or hung; torch knows only its id."""
        loaded = [(name, samples) for name, samples in self._samples.items() if samples.notes is not None]
        add_to_message(
            exception,
            [
                f"sample {index} ({samples.name(index % len(samples))}) of the {name} data of {type(self).__name__}"
                for name, samples in loaded
                if samples.notes is not None
                for index in samples.notes.suspects(exception)
            ],
        )

    def evaluation_dataloader(self, split: Split, *, count: int | None = None) -> DataLoader[Any]:
        """Return batches of any split as for evaluation: in order, without augmentation, with the index.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            count: number of samples, or all if there are fewer, drawn with the class proportions; ``None`` for all.
        """
        source, positions = self._chosen(split)
        if count is not None and count < len(positions):
            positions = positions[stratified_split(source.labels[positions], count, self.split_seed)[1]]
        return self._loader_of(self.make_samples(source, positions, role="eval"))

    def check_test_data(self) -> None:
        """Open the test data and read a sample, so that problems show before training, not after it.

        Raises:
            ValueError: if there is no sample, or no label to compare with.
            FileNotFoundError: if there are no such data.
            SampleError: if the first sample cannot be read.
        """
        self.setup("test")
        samples = self._dataset("test")
        if len(samples) == 0:
            raise ValueError(f"The test data of {type(self).__name__} in {self.root} have no sample.")
        samples[0]

    # Implementation

    def _loader(self, name: _Loaded) -> DataLoader[Any]:
        return self._loader_of(self._dataset(name), role=_ROLES[name])

    def _loader_of(self, dataset: Samples, *, role: Role = "eval") -> DataLoader[Any]:
        train = role == "train"
        size = self.batch_size if train or self.eval_batch_size is None else self.eval_batch_size
        workers = self._worker_count()
        collate = self.collate_function(role)
        dataset.notes = WorkerNotes(workers) if workers > 0 else None
        own = self.training_sampler(dataset) if train else None
        sampler = self.placed_sampler(own, dataset) if train else self._padded_sampler(dataset)
        return NamingLoader(
            dataset,
            batch_size=size,
            shuffle=False,
            sampler=sampler,
            num_workers=workers,
            collate_fn=DrawnCollate(collate) if train and collate is not None else collate,
            generator=loader_generator(self.training_seed, replicas(self.trainer)[1]),
            pin_memory=runs_on_cuda(self.trainer) if self.pin_memory is None else self.pin_memory,
            drop_last=train and self.drop_last,
            timeout=WORKER_TIMEOUT if workers > 0 else 0,
            persistent_workers=workers > 0,
            worker_init_fn=begin_worker if workers > 0 else None,
        )

    def _padded_sampler(self, dataset: Samples) -> PaddedSampler | None:
        count, rank = replicas(self.trainer)
        return PaddedSampler(dataset, num_replicas=count, rank=rank) if count > 1 else None

    def _worker_count(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.needs_no_workers:
            silence_worker_advice()
            return 0
        return automatic_workers(self.trainer)

    def _check_train_size(self) -> None:
        samples, batch_size = len(self._dataset("train")), self.batch_size
        per_process = -(-samples // replicas(self.trainer)[0])
        if self.drop_last and per_process < batch_size:
            raise ValueError(
                f"batch_size={batch_size} is more than the {samples} training samples ({per_process} per process), so "
                "drop_last=True leaves no step to train. Lower batch_size, raise limit, or set drop_last=False."
            )

    def _dataset(self, name: _Loaded) -> Samples:
        if name not in self._samples:
            self._samples[name] = self.make_samples(*self._chosen(name), role=_ROLES[name])
            if name in ("val", "test") and "train" in self._samples:
                self._compare_with_training(name)
        return self._samples[name]

    def _compare_with_training(self, name: Literal["val", "test"]) -> None:
        train, other = self._samples["train"], self._samples[name]
        what = f"the {_NAMES[name]} part"
        warn_of_shared_files(train, other, what)
        trained, seen = train.classes(), other.classes()
        if self.limit is None and trained is not None and seen is not None:
            warn_of_untrained_classes(self.class_names, trained, seen, what)

    def _chosen(self, name: _Loaded) -> tuple[Source, Positions]:
        source, positions = self._select(name)
        if self.limit is not None:
            positions = positions[balanced_subset(source.labels[positions], self.limit, self.split_seed)]
        return source, positions

    def _select(self, name: _Loaded) -> tuple[Source, Positions]:
        if name == "predict" and self.predict_folder is not None:
            return _all(self._images_to_predict(self.predict_folder))
        if name in ("test", "predict"):
            test = self._optional_source("test")
            return self._val_as_test() if test is None else _all(test)
        if name == "val" and (own := self._optional_source("val")) is not None:
            return _all(own)
        if name == "val" and self.val_split == 0:
            return _all(self._test_as_val())
        train = self._source("train")
        if self.val_split == 0 or self._optional_source("val") is not None:
            return _all(train)
        rest, drawn = stratified_split(
            train.labels, self._val_count(len(train.labels)), self.split_seed, leave_one=True
        )
        return train, rest if name == "train" else drawn

    def _val_count(self, total: int) -> int:
        count = round(total * self.val_split) if self.val_split < 1 else int(self.val_split)
        if not 0 < count < total:
            raise ValueError(
                f"val_split={self.val_split} takes {count} of {total} training samples, but must take at least 1 and "
                "leave at least 1."
            )
        return count

    def _test_as_val(self) -> Source:
        test = self._source("test")
        rank_zero_warn(
            "val_split=0: validating on the test set, so the best epoch is chosen by test "
            "accuracy; set val_split=0.1, say, to keep the test set unseen"
        )
        return test

    def _val_as_test(self) -> tuple[Source, Positions]:
        if self._optional_source("val") is None and self.val_split == 0:
            raise self._no_split("test")
        drawn = "" if self.val_split == 0 else "drawn from the training set "
        rank_zero_warn(f"{self.root} has no test data, so the validation part {drawn}is tested on")
        return self._select("val")

    def _source(self, split: Split) -> Source:
        source = self._optional_source(split)
        if source is None:
            raise self._no_split(split)
        return source

    def _no_split(self, split: Split) -> FileNotFoundError:
        return FileNotFoundError(f"{type(self).__name__} has no {split} data in {self.root}.")

    def _optional_source(self, split: Split) -> Source | None:
        if split not in self._sources:
            source = self._sources[split] = self.load_split(split)
            if source is not None:
                warn_of_unused_depth(source, f"{self.root} ({split})")
        return self._sources[split]

    def _images_to_predict(self, given: list[str] | str | Path) -> Source:
        places = [given] if isinstance(given, str | Path) else given
        found = joined([images_at(Path(place).expanduser()) for place in places])
        warn_of_files_left_out(found.left_out, f"predict_folder={given}")
        if not found.paths:
            raise FileNotFoundError(f"predict_folder={given} has no image in it or below it.")
        source = FileSource(found.paths, channels=self.image_channels, bit_depth=self.bit_depth)
        warn_of_unused_depth(source, f"predict_folder={given}")
        return source

    def _missing_data(self, reason: str) -> FileNotFoundError:
        return self.archives()[0].missing(self.archive_folder, reason)


def _all(source: Source) -> tuple[Source, Positions]:
    return source, np.arange(len(source.labels))


def _default_root() -> str:
    return os.environ.get("DIA_DATA") or "~/.cache/dia_lightning"
