"""With test_after_fit, what the test needs is looked for before the training."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dia_lightning.tasks import ClassificationTask
from tests.cli.conftest import Run

Fails = Callable[..., str]
FOLDER = ["--data.class_path", "ImageFolderDataModule", "--data.root", "pets", "--data.val_split", "4"]


@pytest.fixture
def pets(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kaggle's layout: training images in the folder of their class, test images without classes."""
    for name in ("cat", "dog"):
        folder = workplace / "pets" / "train" / name
        folder.mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (20, 20), (number * 20, 90, 30)).save(folder / f"{number}.png")
    (workplace / "pets" / "test").mkdir()
    Image.new("RGB", (20, 20)).save(workplace / "pets" / "test" / "0.png")
    return workplace / "pets"


def stops_before_training(fails: Fails, *options: str) -> str:
    def training_step(*_: object) -> None:
        raise AssertionError("it trains")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", training_step)
        message = fails("fit", "-c", "tiny.yaml", "--test_after_fit", "true", *options)
    assert message.startswith("test_after_fit: ")
    assert not list(Path().rglob("*.ckpt"))
    return message


def test_a_test_folder_without_classes(pets: Path, fails: Fails, run: Run) -> None:
    assert "pets/test has no class folders" in stops_before_training(fails, *FOLDER)
    run("fit", "-c", "tiny.yaml", *FOLDER)  # nobody tests


def test_a_test_image_that_cannot_be_read(pets: Path, fails: Fails) -> None:
    (pets / "test" / "0.png").unlink()
    for name in ("cat", "dog"):
        (pets / "test" / name).mkdir()
        (pets / "test" / name / "0.png").write_text("no image")
    assert "Sample 0 (pets/test/cat/0.png) cannot be loaded" in stops_before_training(fails, *FOLDER)


def test_a_task_without_a_test(workplace: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ClassificationTask, "test_step")
    assert "ClassificationTask has no test_step" in stops_before_training(fails)
