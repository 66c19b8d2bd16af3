import pickle
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import LightningModule
from PIL import Image

from dia_lightning.callbacks import ConfusionMatrix
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer


def test_both_pictures_are_written_at_the_end_of_test(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, ConfusionMatrix()).test(TinyTask(), datamodule=TinyData(), verbose=False)
    for name in ("confusion_matrix", "class_accuracy"):
        with Image.open(tmp_path / "pictures" / "test" / name / "step=000000.png") as image:
            assert min(image.size) > 150
            assert len(np.unique(np.asarray(image))) > 20


def test_fit_draws_no_confusion_matrix(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, ConfusionMatrix()).fit(TinyTask(), datamodule=TinyData())
    assert not (tmp_path / "pictures").exists()


class TaskWithoutCounts(LightningModule):
    pass


def test_a_task_without_confusion_metric_is_refused_before_training(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="TaskWithoutCounts has no metric named 'confusion'"):
        ConfusionMatrix().setup(trainer, TaskWithoutCounts(), "fit")


def test_the_callback_can_be_pickled() -> None:
    assert isinstance(pickle.loads(pickle.dumps(ConfusionMatrix())), ConfusionMatrix)
