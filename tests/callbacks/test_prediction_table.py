from pathlib import Path

import pytest

from dia_lightning.callbacks import PredictionTable
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer


def test_without_weights_and_biases_a_warning_names_the_way_to_it(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, PredictionTable())
    with pytest.warns(UserWarning, match=r"PredictionTable needs Weights & Biases .* -c logger/wandb\.yaml"):
        trainer.test(TinyTask(), datamodule=TinyData())
    assert list(tmp_path.iterdir()) == []


def test_training_without_weights_and_biases_needs_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tiny_trainer(tmp_path, PredictionTable()).fit(TinyTask(), datamodule=TinyData())
    assert not [warning for warning in recwarn if "PredictionTable" in str(warning.message)]


def test_a_table_has_a_row_at_least() -> None:
    with pytest.raises(ValueError, match="num_images must be from 1 to 10000, got 0"):
        PredictionTable(num_images=0)
