"""What the files of predictions have in common: one part per rank, which are merged when all are done."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TextIO, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning._free_path import free_path
from dia_lightning._whole_files import written_whole
from dia_lightning.callbacks._run_folder import run_folder

Row = TypeVar("Row")

TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # any file name survives


class ResultWriter(Callback, ABC):
    """Write what ``test`` and ``predict`` say about each sample to a file in the run folder.

    Each rank writes batch by batch to a part file beside the final one; rank zero merges the parts when all ranks are
    done. An interrupted run leaves its parts. No file is ever overwritten: as with checkpoints, the second file in a
    folder is called ``<name>-v1``. A run over several machines needs a shared disk.

    A subclass says how a batch is written to a part, and how parts become the file.

    Args:
        filename: name of the file in the run folder.

    Attributes:
        path: the file of the last run, on every rank; ``None`` before.
        kind: what the file holds, in the plural.

    Raises:
        ValueError: if ``filename`` is no plain name with the right ending.
    """

    kind: ClassVar[str]
    _suffix: ClassVar[str]
    _part_suffix: ClassVar[str]

    def __init__(self, *, filename: str) -> None:
        if Path(filename).name != filename or not filename.endswith(self._suffix) or filename == self._suffix:
            raise ValueError(
                f"filename must be a plain name that ends in {self._suffix!r}, got {filename!r}. "
                f"Use '{self.kind}{self._suffix}'."
            )
        self.filename = filename
        self.path: Path | None = None
        self._target = Path(filename)
        self._file: TextIO | None = None

    @abstractmethod
    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready for a new file."""

    @abstractmethod
    def _write(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, part: TextIO) -> None:
        """Write the samples of a batch to this rank's part."""

    @abstractmethod
    def _merge(self, parts: list[Path], target: Path) -> None:
        """Write the samples of all parts to ``target``."""

    def _places(self, target: Path) -> list[Path]:
        """Return what a run that writes to ``target`` leaves in the folder, finished or not."""
        return [target, self._part(target, 0)]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's part."""
        batches = trainer.num_test_batches if trainer.testing else trainer.num_predict_batches
        if len(batches) > 1:
            raise ValueError(
                f"{type(self).__name__} takes one dataloader, got {len(batches)}. Run them one after another."
            )
        self._close()  # of a run whose exception never reached this callback
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._target = Path(trainer.strategy.broadcast(str(self._free_path(folder))))
        self._begin(trainer, pl_module)
        self._file = self._part(self._target, trainer.global_rank).open("x", **TEXT)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the samples of a batch."""
        assert self._file is not None
        self._write(trainer, pl_module, outputs, batch, self._file)
        self._file.flush()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts on rank zero as soon as every rank has closed its own."""
        self._close()
        trainer.strategy.barrier(f"{self.kind} are written")
        self.path = self._target
        if trainer.is_global_zero:
            parts = [self._part(self._target, rank) for rank in range(trainer.world_size)]
            missing = [str(part) for part in parts if not part.exists()]
            if missing:
                rank_zero_warn(
                    f"{self._target} lacks the {self.kind} of {', '.join(missing)}, which are not on this machine. "
                    "Keep the run folder on a disk that all machines share."
                )
            parts = [part for part in parts if part.exists()]
            self._merge(parts, self._target)
            for part in parts:
                part.unlink()

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what has been written."""
        if self._file is not None:
            self._close()
            part = self._part(self._target, 0)
            rank_zero_warn(f"The {self.kind} are not complete; those before the error are in {part}.")

    def _free_path(self, folder: Path) -> Path:
        """Return the first name that neither a finished nor an interrupted run has taken."""
        return free_path(folder / self.filename, lambda target: any(place.exists() for place in self._places(target)))

    def _part(self, target: Path, rank: int) -> Path:
        return target.with_name(f"{target.stem}.part{rank}{self._part_suffix}")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def in_order(parts: Iterable[Iterable[tuple[int, Row]]], target: Path) -> list[Row]:
    """Return the rows of all parts, which are pairs of index and row, sorted by index.

    Of a sample that several parts have, the rows of the first are taken. Several rows of one index in one part are all
    taken, with a warning that names ``target``.
    """
    samples: dict[int, list[Row]] = {}
    for part in parts:
        seen_here: dict[int, list[Row]] = {}
        for index, row in part:
            seen_here.setdefault(index, []).append(row)
        for index, rows in seen_here.items():
            samples.setdefault(index, rows)  # ranks repeat samples of one another to fill up their batches
    repeated = [index for index, rows in samples.items() if len(rows) > 1]
    if repeated:
        rank_zero_warn(
            f"{target} has several rows for {len(repeated)} of {len(samples)} indices, for example {min(repeated)}. "
            "Let the dataloader give each sample an index of its own."
        )
    return [row for index in sorted(samples) for row in samples[index]]


@contextmanager
def whole_text(target: Path) -> Iterator[TextIO]:
    """Open a text file that appears under its name when it is complete."""
    with written_whole(target) as part, part.open("w", **TEXT) as file:
        yield file


def sample_owner(trainer: Trainer) -> Any:
    """Return the datamodule if what it says about samples is about those of this run, else ``None``.

    It speaks of the predict set, which is the test set unless it is a folder of the user's.
    """
    datamodule = getattr(trainer, "datamodule", None)
    is_test_set = getattr(datamodule, "predict_folder", None) is None
    return datamodule if is_test_set or trainer.state.stage != RunningStage.TESTING else None


def sample_name(trainer: Trainer, index: int) -> str:
    """Return what the user calls the sample."""
    name = getattr(sample_owner(trainer), "sample_name", None)
    if name is not None:
        return str(name(index))
    return f"{'test' if trainer.state.stage == RunningStage.TESTING else 'predict'}/{index}"
