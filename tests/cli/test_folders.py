"""Image folders through the program: with and without training images, with only those, and with damaged ones."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.conftest import CONFIG, Run, call
from tests.datamodules.tiny_data import pixels, write_image_folder

Fails = Callable[..., str]
DATA = """\
data:
  class_path: ImageFolderDataModule
  init_args: {root: data, image_size: 16, batch_size: 4, num_workers: 0}
"""


@pytest.fixture(scope="session")
def trained_on_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `fit` has run once on images of three classes; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained_on_folders")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_image_folder(Path("data"))
        Path("folders.yaml").write_text(CONFIG.partition("data:")[0] + DATA)
        call("fit", "-c", "folders.yaml")
    return folder


@pytest.fixture
def here(trained_on_folders: Path, workplace: Path) -> Path:
    """The working folder with the data, the run and a folder of photos to predict."""
    shutil.copytree(trained_on_folders, workplace, dirs_exist_ok=True)
    (workplace / "photos").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels(20, 20, 3)).save(workplace / "photos" / name)
    return workplace


PREDICT = ["predict", "-c", "folders.yaml", "--ckpt_path", "best", "--data.predict_folder", "photos"]


def predictions() -> list[dict[str, Any]]:
    [path] = Path("runs").rglob("predictions.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_photos_are_predicted_where_there_are_no_training_images(here: Path, run: Run) -> None:
    run(*PREDICT, "--trainer.callbacks+=PredictionWriter")
    with_training_images = predictions()
    shutil.rmtree("runs/tiny/version_1")
    shutil.rmtree("data")
    run(*PREDICT, "--trainer.callbacks+=PredictionWriter")
    assert predictions() == with_training_images
    assert len(with_training_images) == 2
    assert {"ant", "bee", "cat"} >= {value for row in with_training_images for value in row.values() if len(value) == 3}


def test_single_images_are_predicted(here: Path, run: Run) -> None:
    run(*PREDICT[:-1], "[photos/b.png, data/test/ant/0.png]", "--trainer.callbacks+=PredictionWriter")
    assert [row["sample"] for row in predictions()] == ["photos/b.png", "data/test/ant/0.png"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_measuring_does_without_training_images(
    here: Path, run: Run, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, "-c", "folders.yaml", "--ckpt_path", "best")
    before = capsys.readouterr().out
    shutil.rmtree("data/train")
    run(command, "-c", "folders.yaml", "--ckpt_path", "best")
    assert capsys.readouterr().out == before
    assert "acc_macro" in before


def test_without_a_checkpoint_the_classes_are_not_guessed(here: Path, fails: Fails) -> None:
    shutil.rmtree("data")
    assert "train is not a folder" in fails("predict", "-c", "folders.yaml", "--data.predict_folder", "photos")


def test_training_images_of_other_classes_are_noticed(here: Path, fails: Fails) -> None:
    shutil.move("data/train/cat", "data/train/dog")
    shutil.move("data/test/cat", "data/test/dog")
    assert "trained with class_names [ant, bee, cat]" in fails("test", "-c", "folders.yaml", "--ckpt_path", "best")


def test_training_images_alone_are_enough_for_fit_and_test(
    here: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("val", "test"):
        shutil.rmtree(f"data/{split}")
    with pytest.warns(UserWarning, match="drawn from the training set is tested on"):
        run("fit", "-c", "folders.yaml", "--data.val_split", "0.25", "--test_after_fit", "true")
    assert capsys.readouterr().out.count("Test metric") == 1


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_damaged_image_is_one_line(here: Path, fails: Fails, command: str, workers: str) -> None:
    options = ["fit", "-c", "folders.yaml"] if command == "fit" else PREDICT
    damaged = Path("data/train/bee/1.png" if command == "fit" else "photos/b.png")
    damaged.write_bytes(b"")
    message = fails(*options, "--data.num_workers", workers)
    assert message.startswith("Sample ")
    assert (
        f"{damaged}) cannot be loaded: {damaged} cannot be read as an image (0 bytes). Replace or delete it." in message
    )
    assert "Traceback" not in message


def test_the_trace_of_a_damaged_image_is_there_for_the_asking(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIA_TRACEBACK", "1")
    Path("photos/b.png").write_bytes(b"")
    with pytest.raises(ValueError, match="Original Traceback"):
        run(*PREDICT, "--data.num_workers", "1")
