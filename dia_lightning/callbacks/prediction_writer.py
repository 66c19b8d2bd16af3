"""Predictions as a CSV file."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer

from dia_lightning.callbacks._class_names import class_names, has_several_labels
from dia_lightning.callbacks._result_writer import TEXT, ResultWriter, in_order, sample_name, whole_text
from dia_lightning.callbacks._step_outputs import read_step_outputs

PROBABILITIES_UP_TO = 100  # classes


class PredictionWriter(ResultWriter):
    """Write the predictions of ``test`` and ``predict`` to a CSV file in the run folder.

    Columns: ``sample`` (the datamodule's ``sample_name``, else ``test/<index>``), ``true`` (class name, test only),
    ``label`` (predicted class name), ``confidence``, and one column ``p(<class>)`` per class. Rows are sorted by the
    sample's index. Padding samples (index -1) are left out, and a sample that several ranks have seen is written once;
    samples of one rank with the same index are all written, with a warning. For a task with several labels per image
    ``true`` and ``label`` (probability above 0.5) name them joined by ``;``, and there is no ``confidence``.

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

    kind = "predictions"
    _suffix = ".csv"
    _part_suffix = ".csv"

    def __init__(self, *, filename: str = "predictions.csv", probabilities: bool | None = None) -> None:
        super().__init__(filename=filename)
        self.probabilities = probabilities
        self._names: list[str] | None = None

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names = None

    def _write(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, part: TextIO) -> None:
        labels = batch[1].tolist() if trainer.testing else None
        rows, indices, probabilities = read_step_outputs(outputs)
        writer = csv.writer(part)
        classes = probabilities.shape[1]
        several = has_several_labels(pl_module)
        with_all = classes <= PROBABILITIES_UP_TO if self.probabilities is None else self.probabilities
        if self._names is None:
            self._names = class_names(trainer, pl_module, classes)
            columns = [f"p({name})" for name in self._names] if with_all else []
            true = [] if labels is None else ["true"]
            writer.writerow(["index", "sample", *true, "label", *([] if several else ["confidence"]), *columns])
        best = probabilities.argmax(dim=1).tolist()
        for row, index, label, values in zip(
            rows.tolist(), indices.tolist(), best, probabilities.tolist(), strict=True
        ):
            true = [] if labels is None else [_named(labels[row], self._names)]
            predicted = [value > 0.5 for value in values] if several else label
            numbers = [
                f"{value:.6g}" for value in [*([] if several else [values[label]]), *(values if with_all else [])]
            ]
            writer.writerow([index, sample_name(trainer, index), *true, _named(predicted, self._names), *numbers])

    def _merge(self, parts: list[Path], target: Path) -> None:
        _merge(parts, target)


def _named(label: float | list[float], names: list[str]) -> str:
    """Return the name of a class index, or of all labels of which an image has."""
    if isinstance(label, list):
        return ";".join(name for name, has in zip(names, label, strict=True) if has)
    return names[int(label)]


def _rows(part: Path) -> Iterator[list[str]]:
    with part.open(**TEXT) as file:
        yield from csv.reader(file)


def _merge(parts: list[Path], target: Path) -> None:
    """Write the rows of all parts to ``target``, sorted by index and without it."""
    header: list[str] = []

    def samples(part: Path) -> Iterator[tuple[int, list[str]]]:
        for row in _rows(part):
            if row[0] == "index":
                header[:] = row[1:]
            else:
                yield int(row[0]), row[1:]

    rows = in_order(map(samples, parts), target)
    with whole_text(target) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
