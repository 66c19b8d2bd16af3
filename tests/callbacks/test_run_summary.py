from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dia_lightning.callbacks import PredictionGrid, PredictionWriter, RunSummary
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer


def lines_printed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What stands after each name in the lines with a colon."""
    lines = [line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ":" in line]
    return {name: place.strip() for name, place in lines}


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    best = ModelCheckpoint(monitor="val/acc", mode="max", filename="best")
    last = ModelCheckpoint(filename="last")
    callbacks = [RunSummary(), PredictionGrid(num_images=2), PredictionWriter(), best, last]
    return tiny_trainer(tmp_path, *callbacks, logger=CSVLogger(tmp_path, name="runs"), enable_checkpointing=True)


def test_fit_names_folder_pictures_and_checkpoints(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.fit(TinyTask(), datamodule=TinyData())
    folder = tmp_path / "runs" / "version_0"
    accuracy = float(trainer.callback_metrics["val/acc"])
    assert lines_printed(capsys) == {
        "run folder": str(folder),
        "best checkpoint": f"{folder / 'checkpoints' / 'best.ckpt'} (val/acc = {accuracy:.4f})",
        "last checkpoint": str(folder / "checkpoints" / "last.ckpt"),
        "pictures": str(folder / "pictures"),
    }


def test_test_names_the_predictions_that_a_later_callback_writes(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.test(TinyTask(), datamodule=TinyData(), verbose=False)
    printed = lines_printed(capsys)
    assert Path(printed["predictions"]).is_file()
    assert Path(printed["pictures"]).is_dir()
    assert "best checkpoint" not in printed
    assert "last checkpoint" not in printed


def test_what_does_not_exist_is_not_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, RunSummary()).test(TinyTask(), datamodule=TinyData(), verbose=False)
    assert lines_printed(capsys) == {"run folder": str(tmp_path)}


def test_validate_and_other_ranks_print_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path, RunSummary())
    trainer.validate(TinyTask(), datamodule=TinyData(), verbose=False)
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    trainer.test(TinyTask(), datamodule=TinyData(), verbose=False)
    assert lines_printed(capsys) == {}
