"""Predictions as a CSV file."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.callbacks._class_names import class_names
from dia_lightning.callbacks._run_folder import run_folder
from dia_lightning.callbacks._step_outputs import read_step_outputs

PROBABILITIES_UP_TO = 100  # classes


class PredictionWriter(Callback):
    """Write the predictions of ``test`` and ``predict`` to a CSV file in the run folder.

    Columns: ``sample`` (the datamodule's ``sample_name``, else ``test/<index>``), ``true`` (class name, test only),
    ``label`` (predicted class name), ``confidence``, and one column ``p(<class>)`` per class. Rows are sorted by the
    sample's index. Padding samples (index -1) are left out, and a sample that several ranks have seen is written once;
    samples of one rank with the same index are all written, with a warning.

    Each rank writes its rows batch by batch to a part file beside the final one; rank zero merges the parts when all
    ranks are done. An interrupted run leaves its parts. No file is ever overwritten: as with checkpoints, the
    second file in a folder is called ``predictions-v1.csv``. A run over several machines needs a shared disk.

    The steps must return ``{"index": [B], "probabilities": [B, K]}``; in test the second part of a batch are the
    labels.

    Args:
        filename: name of the file in the run folder, ending in ``.csv``.
        probabilities: whether to write the columns ``p(<class>)``; ``None`` writes them for up to 100 classes.

    Attributes:
        path: the file of the last run, on every rank; ``None`` before.

    Raises:
        ValueError: if ``filename`` is no plain name of a CSV file, or a step returns something else.

    Example:
        >>> PredictionWriter(probabilities=False).path is None
        True
        >>> PredictionWriter(filename="results/all.csv")
        Traceback (most recent call last):
        ...
        ValueError: filename must be a plain name that ends in '.csv', got 'results/all.csv'. Use 'predictions.csv'.
    """

    def __init__(self, *, filename: str = "predictions.csv", probabilities: bool | None = None) -> None:
        if Path(filename).name != filename or not filename.endswith(".csv") or filename == ".csv":
            raise ValueError(
                f"filename must be a plain name that ends in '.csv', got {filename!r}. Use 'predictions.csv'."
            )
        self.filename = filename
        self.probabilities = probabilities
        self.path: Path | None = None
        self._target = Path(filename)
        self._file: TextIO | None = None
        self._names: list[str] | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's part."""
        self._open(trainer, trainer.num_test_batches if trainer.testing else trainer.num_predict_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch, in test with their true classes."""
        self._write(trainer, pl_module, outputs, batch[1].tolist() if trainer.testing else None)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts."""
        self._finish(trainer)

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what has been written."""
        if self._file is not None:
            self._close()
            rank_zero_warn(f"The predictions are not complete; those before the error are in {_part(self._target, 0)}.")

    def _open(self, trainer: Trainer, batches: list[int | float]) -> None:
        if len(batches) > 1:
            raise ValueError(f"PredictionWriter takes one dataloader, got {len(batches)}. Run them one after another.")
        self._close()  # of a run whose exception never reached this callback
        self._names = None
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._target = Path(trainer.strategy.broadcast(str(self._free_path(folder))))
        self._file = _part(self._target, trainer.global_rank).open("x", **_TEXT)

    def _free_path(self, folder: Path) -> Path:
        """Return the first name that neither a finished nor an interrupted run has taken."""
        stem, number = Path(self.filename).stem, 0
        path = folder / self.filename
        while path.exists() or _part(path, 0).exists():
            number += 1
            path = folder / f"{stem}-v{number}.csv"
        return path

    def _write(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, labels: list[int] | None) -> None:
        assert self._file is not None
        rows, indices, probabilities = read_step_outputs(outputs)
        writer = csv.writer(self._file)
        classes = probabilities.shape[1]
        with_all = classes <= PROBABILITIES_UP_TO if self.probabilities is None else self.probabilities
        if self._names is None:
            self._names = class_names(trainer, pl_module, classes)
            columns = [f"p({name})" for name in self._names] if with_all else []
            true = [] if labels is None else ["true"]
            writer.writerow(["index", "sample", *true, "label", "confidence", *columns])
        predicted = probabilities.argmax(dim=1).tolist()
        for row, index, label, values in zip(
            rows.tolist(), indices.tolist(), predicted, probabilities.tolist(), strict=True
        ):
            true = [] if labels is None else [self._names[labels[row]]]
            numbers = [f"{value:.6g}" for value in [values[label], *(values if with_all else [])]]
            writer.writerow([index, _sample_name(trainer, index), *true, self._names[label], *numbers])
        self._file.flush()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _finish(self, trainer: Trainer) -> None:
        """Merge the parts on rank zero as soon as every rank has closed its own."""
        self._close()
        trainer.strategy.barrier("predictions are written")
        self.path = self._target
        if trainer.is_global_zero:
            parts = [_part(self._target, rank) for rank in range(trainer.world_size)]
            missing = [str(part) for part in parts if not part.exists()]
            if missing:
                rank_zero_warn(
                    f"{self._target} lacks the predictions of {', '.join(missing)}, which are not on this machine. "
                    "Keep the run folder on a disk that all machines share."
                )
            _merge([part for part in parts if part.exists()], self._target)


_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # any file name survives


def _part(target: Path, rank: int) -> Path:
    return target.with_name(f"{target.stem}.part{rank}.csv")


def _sample_name(trainer: Trainer, index: int) -> str:
    """Return what the user calls the sample."""
    datamodule = getattr(trainer, "datamodule", None)
    stage = "test" if trainer.state.stage == RunningStage.TESTING else "predict"
    # sample_name speaks of the predict set, which is the test set unless it is a folder of the user's
    is_test_set = getattr(datamodule, "predict_folder", None) is None
    if datamodule is not None and hasattr(datamodule, "sample_name") and (stage == "predict" or is_test_set):
        return str(datamodule.sample_name(index))
    return f"{stage}/{index}"


def _rows(part: Path) -> Iterator[list[str]]:
    with part.open(**_TEXT) as file:
        yield from csv.reader(file)


def _merge(parts: list[Path], target: Path) -> None:
    """Write the rows of all parts to ``target``, sorted by index and without it, and remove the parts."""
    header: list[str] = []
    samples: dict[int, list[list[str]]] = {}
    for part in parts:
        seen_here: dict[int, list[list[str]]] = {}
        for row in _rows(part):
            if row[0] == "index":
                header = row[1:]
            else:
                seen_here.setdefault(int(row[0]), []).append(row[1:])
        for index, rows in seen_here.items():
            samples.setdefault(index, rows)  # ranks repeat samples of one another to fill up their batches
    repeated = [index for index, rows in samples.items() if len(rows) > 1]
    if repeated:
        rank_zero_warn(
            f"{target} has several rows for {len(repeated)} of {len(samples)} indices, for example {min(repeated)}. "
            "Let the dataloader give each sample an index of its own."
        )
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    with unfinished.open("w", **_TEXT) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for index in sorted(samples):
            writer.writerows(samples[index])
    os.replace(unfinished, target)
    for part in parts:
        part.unlink()
