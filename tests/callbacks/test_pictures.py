import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from dia_lightning.callbacks import DetectionGrid
from dia_lightning.callbacks.pictures import log_picture
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer
from tests.callbacks.tiny_detector import TinyDetector, TinyScenes, by_index

RED = Image.new("RGB", (7, 5), (200, 0, 0))


class LogRed(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path = log_picture(trainer, "val/red", RED)


def fit_with_red_picture(
    folder: Path, logger: Logger | Sequence[Logger] | bool = False, fast_dev_run: bool = False
) -> Path:
    callback = LogRed()
    tiny_trainer(folder, callback, logger=logger, fast_dev_run=fast_dev_run).fit(TinyTask(), datamodule=TinyData())
    assert callback.path is not None
    return callback.path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_without_a_logger_the_picture_is_a_file_below_the_root_folder(tmp_path: Path) -> None:
    path = fit_with_red_picture(tmp_path)
    assert path == tmp_path / "pictures" / "val" / "red" / "step=000006.png"
    np.testing.assert_array_equal(pixels(path), np.asarray(RED))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_fast_dev_run_writes_the_file_elsewhere(tmp_path: Path) -> None:
    path = fit_with_red_picture(tmp_path, logger=True, fast_dev_run=True)
    assert path.is_file()
    assert tmp_path not in path.parents


def test_with_a_csv_logger_each_run_has_its_own_pictures(tmp_path: Path) -> None:
    first, second = (fit_with_red_picture(tmp_path, CSVLogger(tmp_path, name="runs")) for _ in range(2))
    assert first.is_relative_to(tmp_path / "runs" / "version_0" / "pictures")
    assert second.is_relative_to(tmp_path / "runs" / "version_1" / "pictures")


def test_a_logger_after_the_first_gets_the_picture_too(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="board")
    path = fit_with_red_picture(tmp_path, [CSVLogger(tmp_path, name="csv"), board])
    assert path.is_relative_to(tmp_path / "csv")
    events = EventAccumulator(board.log_dir).Reload()
    assert events.Tags()["images"] == ["val/red"]
    image = events.Images("val/red")[0]
    assert (image.step, image.width, image.height) == (6, 7, 5)


class CommError(Exception):
    """Like the error of Weights & Biases of this name, which derives from Exception alone."""


class LoggerThatLostItsServer(CSVLogger):
    def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
        raise CommError("the service is gone")


LOST = r"val/red did not reach LoggerThatLostItsServer: CommError: the service is gone\."


def test_a_lost_logger_warns_and_file_and_other_loggers_still_get_the_picture(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="board")
    with pytest.warns(UserWarning, match=LOST):
        path = fit_with_red_picture(tmp_path, [LoggerThatLostItsServer(tmp_path), board])
    assert path.is_file()
    assert EventAccumulator(board.log_dir).Reload().Tags()["images"] == ["val/red"]


def test_each_lost_logger_warns_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")  # Python alone would show equal warnings once
    loggers = [LoggerThatLostItsServer(tmp_path, name=name) for name in "ab"]
    trainer = tiny_trainer(tmp_path, logger=loggers)
    for _ in range(3):
        log_picture(trainer, "val/red", RED)
    assert sum(re.search(LOST, str(warning.message)) is not None for warning in recwarn) == 2


def test_a_folder_that_cannot_be_written_warns_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("a file in the way")
    callback = LogRed()
    with pytest.warns(UserWarning, match="val/red was not written"):
        tiny_trainer(tmp_path, callback).fit(TinyTask(), datamodule=TinyData())
    assert callback.path is None


def test_a_figure_is_drawn_at_its_own_size(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1), dpi=50, facecolor=(0, 0, 1))
    path = log_picture(tiny_trainer(tmp_path), "blue", figure)
    assert path is not None
    image = pixels(path)
    assert image.shape == (50, 100, 3)
    assert (image == (0, 0, 255)).all()


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    assert log_picture(tiny_trainer(tmp_path), "val/red", RED) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../red", "/red", "val//red", "val/red/"])
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="words divided by '/'"):
        log_picture(tiny_trainer(tmp_path), name, RED)


def test_the_package_imports_without_wandb_and_tensorboard() -> None:
    code = (
        "import sys, dia_lightning.callbacks; print([name for name in ('wandb', 'tensorboard') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


WANDB_RUNS = """
import sys
from pathlib import Path
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer
from tests.callbacks.tiny_detector import TinyDetector, TinyScenes
from dia_lightning.callbacks import DetectionGrid, PredictionGrid

folder = Path(sys.argv[1])
logger = WandbLogger(save_dir=folder, project="tiny", id="run7")
trainer = tiny_trainer(folder, PredictionGrid(num_images=4), logger=logger, max_epochs=2)
trainer.fit(TinyTask(), datamodule=TinyData())
logger.experiment.finish()
loggers = [WandbLogger(save_dir=folder, project="tiny", id="run8"), CSVLogger(folder, name="csv")]
trainer = tiny_trainer(folder, DetectionGrid(num_images=3), logger=loggers)
trainer.fit(TinyDetector(), datamodule=TinyScenes())
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of Weights & Biases: one of a classifier, one of a detector with a second logger."""
    folder = tmp_path_factory.mktemp("offline")
    # not WANDB_SERVICE, with which a process joins those that this one has started
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", WANDB_RUNS, str(folder)], env=environment, cwd=folder, check=True)
    return folder


def summary_of(run: Path) -> dict[str, Any]:
    """Read the last values of a run with wandb's own reader."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(run)]
    summary: dict[str, Any] = json.loads(subprocess.check_output(command))["summary"]
    return summary


def test_an_offline_wandb_run_holds_the_pictures_and_the_scalars(offline: Path) -> None:
    (run,) = (offline / "wandb").glob("offline-run-*-run7")
    media = list((run / "files" / "media" / "images" / "val").glob("predictions_*.png"))
    media.sort(key=lambda file: int(file.name.split("_")[1]))
    files = sorted((offline / "tiny" / "run7" / "pictures" / "val" / "predictions").iterdir())
    assert [file.name for file in files] == ["step=000006.png", "step=000012.png"]
    for sent, written in zip(media, files, strict=True):
        np.testing.assert_array_equal(pixels(sent), pixels(written))
    summary = summary_of(run)
    assert {"train/loss", "val/acc"} <= set(summary)
    assert summary["val/predictions"]["filenames"] == [f"media/images/val/{media[-1].name}"]


def test_an_offline_wandb_run_holds_boxes_as_data(offline: Path) -> None:
    (run,) = (offline / "wandb").glob("offline-run-*-run8")
    summary = summary_of(run)
    assert len(summary["val/detections"]["filenames"]) == 1
    logged = summary["val/boxes"]
    data = TinyScenes()
    samples = [0, 2, 4]
    height, width = (max(data.images[i].shape[side] for i in samples) for side in (1, 2))
    assert (logged["height"], logged["width"]) == (height, width)
    for sample, file, groups in zip(samples, logged["filenames"], logged["all_boxes"], strict=True):
        image = data.images[sample]
        shown = pixels(run / "files" / file)
        assert shown.shape == (height, width, 3)
        expected = (image.permute(1, 2, 0) * 255).numpy()
        np.testing.assert_allclose(shown[: image.shape[1], : image.shape[2]], expected, atol=1)
        content = {key: json.loads((run / "files" / group["path"]).read_text()) for key, group in groups.items()}
        assert_boxes_are_those_of(content, sample)


def assert_boxes_are_those_of(content: dict[str, Any], sample: int) -> None:
    expected = by_index(sample)
    for key, count in (("ground_truth", len(expected["boxes"])), ("predictions", min(len(expected["boxes"]), 1))):
        boxes = content[key]["box_data"]
        assert content[key]["class_labels"] == {"1": "cat", "2": "dog, small", "3": "owl"}
        assert [list(box["position"].values()) for box in boxes] == expected["boxes"][:count].tolist()
        assert [list(box["position"]) for box in boxes] == [["minX", "minY", "maxX", "maxY"]] * count
        assert [box["class_id"] for box in boxes] == expected["labels"][:count].tolist()
        assert [box["domain"] for box in boxes] == ["pixel"] * count
        scores = [{"score": 0.875}] * count if key == "predictions" else [None] * count
        assert [box.get("scores") for box in boxes] == scores


class LoggerOfPictures(CSVLogger):
    """Takes pictures, but knows no boxes."""

    def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
        self.keys = [*getattr(self, "keys", []), key]


def test_loggers_without_boxes_get_the_picture_alone(tmp_path: Path) -> None:
    logger = LoggerOfPictures(tmp_path)
    tiny_trainer(tmp_path, DetectionGrid(), logger=logger).fit(TinyDetector(), datamodule=TinyScenes())
    assert logger.keys == ["val/detections"]
