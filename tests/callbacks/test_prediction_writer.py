import copy
import csv
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from dia_lightning.callbacks import PredictionWriter
from dia_lightning.callbacks.prediction_writer import _merge
from tests.callbacks.tiny_classifier import NAMES, TinyData, TinyTask, tiny_trainer


class Scripted(TinyTask):
    """Answers with probabilities that follow from the index, so that a file can be written down by hand."""

    def __init__(self, num_classes: int = 3, stop_at: int | None = None) -> None:
        super().__init__(num_classes)
        self.num_classes = num_classes
        self.stop_at = stop_at

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        index = batch[1]
        if self.stop_at is not None and self.stop_at in index:
            raise RuntimeError("stop here")
        probabilities = torch.zeros(len(index), self.num_classes)
        probabilities[:, 0] = 0.25
        probabilities[torch.arange(len(index)), 1 + index % 2] = 0.75
        return {"index": index, "probabilities": probabilities}


def rows_of(path: Path | None) -> list[list[str]]:
    assert path is not None
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def predict(folder: Path, writer: PredictionWriter, data: TinyData, task: TinyTask | None = None) -> list[list[str]]:
    tiny_trainer(folder, writer).predict(task or Scripted(), datamodule=data, return_predictions=False)
    return rows_of(writer.path)


def test_predict_writes_sample_label_confidence_and_probabilities(tmp_path: Path) -> None:
    writer = PredictionWriter()
    predict(tmp_path, writer, TinyData(samples=3, batch_size=2, predict_folder="photos"))
    assert writer.path == tmp_path / "predictions.csv"
    assert writer.path.read_text() == (
        'sample,label,confidence,p(cat),"p(dog, small)",p(owl)\n'
        'photos/0,"dog, small",0.75,0.25,0.75,0\n'
        "photos/1,owl,0.75,0.25,0,0.75\n"
        'photos/2,"dog, small",0.75,0.25,0.75,0\n'
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["predictions.csv"]


def test_test_also_writes_the_true_class(tmp_path: Path) -> None:
    writer, data = PredictionWriter(filename="test.csv", probabilities=False), TinyData(samples=5)
    tiny_trainer(tmp_path, writer).test(Scripted(), datamodule=data, verbose=False)
    header, *rows = rows_of(tmp_path / "test.csv")
    assert header == ["sample", "true", "label", "confidence"]
    assert [row[0] for row in rows] == [f"test/{i}" for i in range(5)]
    assert [row[1] for row in rows] == [NAMES[int(label)] for label in data.labels]
    assert [row[2] for row in rows] == [NAMES[1 + i % 2] for i in range(5)]


def test_test_samples_are_not_named_after_the_files_to_predict(tmp_path: Path) -> None:
    writer = PredictionWriter()
    data = TinyData(samples=2, predict_folder="photos")
    tiny_trainer(tmp_path, writer).test(Scripted(), datamodule=data, verbose=False)
    assert [row[0] for row in rows_of(writer.path)[1:]] == ["test/0", "test/1"]


def test_without_a_datamodule_samples_are_numbered(tmp_path: Path) -> None:
    writer = PredictionWriter()
    trainer = tiny_trainer(tmp_path, writer)
    trainer.predict(Scripted(), TinyData(samples=2).predict_dataloader(), return_predictions=False)
    assert rows_of(writer.path)[1] == ["predict/0", "1", "0.75", "0.25", "0.75", "0"]


def test_padding_samples_are_not_written(tmp_path: Path) -> None:
    assert len(predict(tmp_path, PredictionWriter(), TinyData(samples=7, padding=3))) == 1 + 4


def test_the_true_class_stays_beside_its_sample_when_padding_comes_first(tmp_path: Path) -> None:
    writer, data = PredictionWriter(), TinyData(samples=4)
    data.index = torch.tensor([-1, 2, -1, 0])
    tiny_trainer(tmp_path, writer).test(Scripted(), datamodule=data, verbose=False)
    true = {row[0]: row[1] for row in rows_of(writer.path)[1:]}
    assert true == {"test/0": NAMES[int(data.labels[3])], "test/2": NAMES[int(data.labels[1])]}


@pytest.mark.parametrize(
    ("probabilities", "classes", "columns"),
    [(None, 3, 6), (None, 100, 103), (None, 101, 3), (True, 101, 104), (False, 3, 3)],
)
def test_probabilities_are_written_for_up_to_100_classes_unless_told_otherwise(
    tmp_path: Path, probabilities: bool | None, classes: int, columns: int
) -> None:
    data, task = TinyData(samples=2), Scripted(classes)
    data.class_names = task.class_names = [f"class {i}" for i in range(classes)]
    rows = predict(tmp_path, PredictionWriter(probabilities=probabilities), data, task)
    assert [len(row) for row in rows] == [columns] * 3


def test_file_names_that_are_no_text_survive(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.png")
    data = TinyData(samples=1)
    data.sample_name = lambda index: name  # type: ignore[method-assign]
    assert predict(tmp_path, PredictionWriter(), data)[1][0] == name


def test_a_second_run_in_the_same_folder_keeps_the_first_file(tmp_path: Path) -> None:
    predict(tmp_path, PredictionWriter(), TinyData(samples=2))
    before = (tmp_path / "predictions.csv").read_bytes()
    writer = PredictionWriter()
    predict(tmp_path, writer, TinyData(samples=3))
    assert writer.path == tmp_path / "predictions-v1.csv"
    assert (tmp_path / "predictions.csv").read_bytes() == before


def test_the_file_lies_in_the_folder_of_the_logger(tmp_path: Path) -> None:
    writer = PredictionWriter()
    trainer = tiny_trainer(tmp_path, writer, logger=CSVLogger(tmp_path, name="runs"))
    trainer.predict(Scripted(), datamodule=TinyData(), return_predictions=False)
    assert writer.path == tmp_path / "runs" / "version_0" / "predictions.csv"


def test_an_interrupted_run_keeps_its_rows_and_the_next_run_leaves_them(tmp_path: Path) -> None:
    writer = PredictionWriter()
    trainer = tiny_trainer(tmp_path, writer)
    with (
        pytest.warns(UserWarning, match=r"not complete; those before the error are in .*predictions.part0.csv"),
        pytest.raises(RuntimeError, match="stop here"),
    ):
        trainer.predict(Scripted(stop_at=9), datamodule=TinyData(), return_predictions=False)
    part = tmp_path / "predictions.part0.csv"
    assert [row[0] for row in rows_of(part)] == ["index", *"01234567"]
    predict(tmp_path, writer, TinyData(samples=2))
    assert writer.path == tmp_path / "predictions-v1.csv"
    assert len(rows_of(part)) == 9


def test_rows_are_on_disk_after_every_batch(tmp_path: Path) -> None:
    seen = []

    class Watching(Scripted):
        def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
            seen.append(len(rows_of(tmp_path / "predictions.part0.csv")))
            return super().predict_step(batch, batch_idx)

    predict(tmp_path, PredictionWriter(), TinyData(samples=12), Watching())
    assert seen == [0, 5, 9]


def test_samples_in_any_order_are_sorted(tmp_path: Path) -> None:
    data = TinyData(samples=5)
    data.index = torch.tensor([3, 1, 4, 0, 2])
    rows = predict(tmp_path, PredictionWriter(), data)
    assert [row[0] for row in rows[1:]] == [f"test/{i}" for i in range(5)]


def test_samples_of_one_index_are_all_written_with_a_warning(tmp_path: Path) -> None:
    data = TinyData(samples=6)
    data.index = torch.tensor([1, 0, 2, 1, 2, 1])
    with pytest.warns(UserWarning, match=r"predictions\.csv has several rows for 2 of 3 indices, for example 1\. Let"):
        rows = predict(tmp_path, PredictionWriter(), data)
    assert [row[0] for row in rows[1:]] == ["test/0", *["test/1"] * 3, *["test/2"] * 2]


def test_a_sample_of_several_ranks_is_written_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    parts = [tmp_path / "all.part0.csv", tmp_path / "all.part1.csv"]
    parts[0].write_text("index,sample\n2,c\n0,a\n")
    parts[1].write_text("index,sample\n1,b\n0,again\n")
    _merge(parts, tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_text() == "sample\na\nb\nc\n"
    assert not list(recwarn)


class TaskForSeveralLoaders(Scripted):
    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return super().predict_step(batch, batch_idx)


def test_several_dataloaders_are_refused(tmp_path: Path) -> None:
    loaders = [TinyData().predict_dataloader()] * 2
    with pytest.raises(ValueError, match="one dataloader, got 2"):
        tiny_trainer(tmp_path, PredictionWriter()).predict(TaskForSeveralLoaders(), loaders)


@pytest.mark.parametrize("filename", ["", ".csv", "all.txt", "../all.csv", "folder/all.csv"])
def test_a_filename_that_is_no_plain_csv_name_is_refused(filename: str) -> None:
    with pytest.raises(ValueError, match=r"filename must be a plain name that ends in '\.csv'"):
        PredictionWriter(filename=filename)


def test_the_callback_can_be_copied_and_pickled() -> None:
    writer = PredictionWriter(filename="all.csv")
    assert copy.deepcopy(writer).filename == pickle.loads(pickle.dumps(writer)).filename == "all.csv"


TWO_PROCESSES = """
import sys
from pathlib import Path
from dia_lightning.callbacks import EMA, ConfusionMatrix, PredictionGrid, PredictionWriter, RunSummary
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer

writer = PredictionWriter()
callbacks = [EMA(decay=0.5), PredictionGrid(num_images=4), ConfusionMatrix(), writer, RunSummary()]
trainer = tiny_trainer(Path(sys.argv[1]), *callbacks, devices=2, strategy="ddp_fork", fast_dev_run=False)
task, data = TinyTask(), TinyData(samples=11, batch_size=3)
trainer.fit(task, datamodule=data)
trainer.test(task, datamodule=data, verbose=False)
trainer.predict(task, datamodule=data, return_predictions=False)
"""


def test_two_processes_write_one_file_with_every_sample_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", TWO_PROCESSES, str(tmp_path)]
    printed = subprocess.check_output(command, env=environment, cwd=tmp_path, text=True, timeout=200)
    header, *rows = rows_of(tmp_path / "predictions.csv")
    assert header[:3] == ["sample", "true", "label"]
    assert [row[0] for row in rows] == [f"test/{i}" for i in range(11)]
    data = TinyData(samples=11)
    assert [row[1] for row in rows] == [NAMES[int(label)] for label in data.labels]
    assert len(rows_of(tmp_path / "predictions-v1.csv")) == 12
    assert not list(tmp_path.glob("*.part*"))
    pictures = sorted(str(path.relative_to(tmp_path / "pictures").parent) for path in tmp_path.rglob("*.png"))
    assert pictures == ["test/class_accuracy", "test/confusion_matrix", "test/predictions", "val/predictions"]
    assert printed.count("predictions-v1.csv") == 1
