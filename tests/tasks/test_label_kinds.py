"""Several labels per image, and yes or no."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
from torch import Tensor

from dia_lightning.callbacks import ConfusionMatrix, PredictionGrid, PredictionTable, PredictionWriter
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask, load_task
from dia_lightning.tasks.image_features import ClassifierFeatures
from tests.tasks.conftest import Given, small_task, small_trainer
from tests.tasks.test_classification import Scores


def images_of(logits: Tensor) -> Tensor:
    """Images whose logits a Scores network reads."""
    return logits.reshape(len(logits), -1, 1, 1)


def batches_of(logits: Tensor, labels: Tensor) -> Given:
    return Given([(images_of(logits[:9]), labels[:9]), (images_of(logits[9:]), labels[9:])])


def several(count: int = 30) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = (torch.rand(count, 4) < torch.tensor([0.5, 0.2, 0.7, 0.4])).long()
    # all in [0, 1], which torchmetrics would take for probabilities
    return (0.4 * torch.rand(count, 4) + 0.6 * labels).clamp(0, 1), labels


def test_several_labels_are_measured_as_by_scikit_learn(tmp_path: Path) -> None:
    logits, labels = several()
    logits = 2 * logits - 1
    (result,) = small_trainer(tmp_path).test(
        ClassificationTask(Scores(), 4, task="multilabel"), batches_of(logits, labels), verbose=False
    )
    predicted = (logits > 0).long()
    assert result["test/acc"] == pytest.approx(accuracy_score(labels, predicted))
    assert result["test/f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert result["test/map"] == pytest.approx(average_precision_score(labels, logits, average="macro"))
    wanted = F.binary_cross_entropy_with_logits(logits, labels.float())
    assert result["test/loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, -0.6])  # without it all logits are in [0, 1]
def test_yes_and_no_are_measured_as_by_scikit_learn(tmp_path: Path, shift: float) -> None:
    logits, labels = (column[:, 0] for column in several())
    logits = logits + shift
    task = ClassificationTask(Scores(), task="binary")
    (result,) = small_trainer(tmp_path).validate(task, batches_of(logits, labels), verbose=False)
    assert result["val/acc"] == pytest.approx(accuracy_score(labels, logits > 0))
    assert result["val/f1"] == pytest.approx(f1_score(labels, logits > 0))
    assert result["val/auroc"] == pytest.approx(roc_auc_score(labels, logits))
    assert result["val/ap"] == pytest.approx(average_precision_score(labels, logits))
    assert result["val/loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels.float()).item())
    assert task.evaluation_loss((images_of(logits), labels)).item() == pytest.approx(30 * result["val/loss"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_training_weighs_positives_and_takes_soft_labels(tmp_path: Path, precision: Any) -> None:
    logits, labels = several()
    soft = 0.8 * labels + 0.1
    for task, images, given, weight in (
        (ClassificationTask(Scores(), 4, task="multilabel", class_weights=[1, 2, 3, 4]), logits, soft, [1.0, 2, 3, 4]),
        (ClassificationTask(Scores(), task="binary", class_weights=[3]), logits[:, :1], soft[:, 0], [3.0]),
    ):
        torch.manual_seed(0)
        trainer = small_trainer(tmp_path, limit_val_batches=0, precision=precision)
        trainer.fit(task, Given([(images_of(images), given)]))
        wanted = F.binary_cross_entropy_with_logits(
            images.squeeze(1) if images.shape[1] == 1 else images, given, pos_weight=torch.tensor(weight)
        )
        assert trainer.callback_metrics["train/loss"].item() == pytest.approx(wanted.item(), rel=2e-2)


def test_mixed_classes_and_smoothing_are_those_of_two_classes() -> None:
    # two logits (0, z) are one logit z
    logits, soft = torch.randn(6), torch.rand(6, 1)
    soft = torch.cat([1 - soft, soft], 1)
    task = ClassificationTask(Scores(), 2, task="binary", label_smoothing=0.2)
    two = torch.stack([torch.zeros(6), logits], 1)
    wanted = F.cross_entropy(two, soft, label_smoothing=0.2)
    kind = task._kind
    found = kind.training_loss(logits, kind.read(soft, training=True), weight=None, smoothing=0.2)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(kind.probabilities(logits), two.softmax(1))


def test_balanced_weights_are_negatives_per_positive(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    _, labels = several()
    labels[:, 3] = 0
    for task, given in (
        (ClassificationTask(Scores(), 4, task="multilabel", class_weights="balanced"), labels),
        (ClassificationTask(Scores(), task="binary", class_weights="balanced"), labels[:, 0]),
    ):
        loader = DataLoader(TensorDataset(torch.zeros(30, task._kind.outputs, 1, 1), given), 30)
        small_trainer(tmp_path, limit_val_batches=0).fit(task, loader)
        columns = given.reshape(30, -1).numpy()
        wanted = [(column == 0).sum() / column.sum() if column.any() else 1.0 for column in columns.T]
        assert task._loss_weight is not None
        assert task._loss_weight.tolist() == pytest.approx(wanted)


class Two(DigitsDataModule):
    """Digits that are below five or not."""

    @property
    def class_names(self) -> list[str]:
        return ["low", "high"]

    def load_split(self, split: Any) -> Any:
        source: Any = super().load_split(split)
        if source is not None:
            source.labels = (source.labels > 4).astype(np.int64)
        return source


def rows_of(path: Path | None) -> list[dict[str, str]]:
    assert path is not None
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_binary_task_trains_tests_and_reloads_with_all_callbacks(tmp_path: Path) -> None:
    data = Two(image_size=8, batch_size=16, limit=33, sampling="balanced", mixup=0.2)
    writer = PredictionWriter()
    trainer = small_trainer(
        tmp_path,
        callbacks=[
            ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val/auroc", mode="max"),
            PredictionGrid(num_images=4),
            ConfusionMatrix(),
            writer,
        ],
    )
    task = small_task(num_classes=2, task="binary")
    trainer.fit(task, data)
    (result,) = trainer.test(task, data, ckpt_path="best", weights_only=True, verbose=False)
    assert task.confusion is not None
    assert task.confusion.compute().trace() / 33 == pytest.approx(result["test/acc"])
    rows = rows_of(writer.path)
    assert sum(row["true"] == row["label"] for row in rows) / 33 == pytest.approx(result["test/acc"])
    assert all(float(row["p(low)"]) + float(row["p(high)"]) == pytest.approx(1, abs=1e-5) for row in rows)
    restored = load_task(tmp_path / "best.ckpt")
    images = torch.randn(3, 3, 8, 8)
    assert restored(images).shape == (3, 1)
    assert torch.equal(restored(images), task.eval()(images))
    with pytest.raises(ValueError, match="must hold a classifier with task='multiclass', but has 'binary'"):
        ClassifierFeatures(tmp_path / "best.ckpt")


def test_several_labels_are_written_and_pictures_of_one_class_refused(tmp_path: Path) -> None:
    logits, labels = several(12)
    logits = 2 * logits - 1
    task = ClassificationTask(Scores(), 4, task="multilabel")
    writer = PredictionWriter()
    small_trainer(tmp_path, callbacks=[writer]).test(task, batches_of(logits, labels), verbose=False)
    rows = rows_of(writer.path)
    assert list(rows[0]) == ["sample", "true", "label", "p(0)", "p(1)", "p(2)", "p(3)"]
    for row, true, values in zip(rows, labels.tolist(), logits.tolist(), strict=True):
        assert row["true"] == ";".join(str(k) for k in range(4) if true[k])
        assert row["label"] == ";".join(str(k) for k in range(4) if values[k] > 0)
        assert float(row["p(1)"]) == pytest.approx(1 / (1 + np.exp(-values[1])), abs=1e-5)
    for callback in (PredictionGrid(), PredictionTable(), ConfusionMatrix()):
        trainer = small_trainer(tmp_path, callbacks=[callback])
        with pytest.raises(ValueError, match=f"{type(callback).__name__} is for images of one class each"):
            trainer.test(task, batches_of(logits, labels), verbose=False)


@pytest.mark.parametrize(
    ("task", "classes", "labels", "message"),
    [
        (
            "multilabel",
            3,
            torch.tensor([0, 2]),
            r"must be \[B, 3\] of 0 and 1 .*got \[2\] of int64 from 0 to 2.*multiclass",
        ),
        ("multilabel", 3, torch.zeros(2, 4), r"got \[2, 4\] of float32"),
        ("multilabel", 3, torch.tensor([[0, 1, 2], [0, 0, 0]]), "from 0 to 2"),
        ("multilabel", 3, torch.tensor([[0.0, 1.0, torch.nan], [0, 0, 0]]), "from nan to nan"),
        ("multilabel", 3, torch.tensor([[0, 1, -1], [0, 0, 0]]), "from -1 to 1"),
        ("binary", 2, torch.tensor([1, 2]), r"must be \[B\] of 0 and 1 .*from 1 to 2"),
        ("binary", 2, torch.tensor([[1], [0]]), r"squeeze\(1\)"),
        ("binary", 2, torch.tensor([[1, 0], [0, 1]]), r"got \[2, 2\] of int64"),
        ("multiclass", 3, torch.tensor([[1.0, 1, 0], [0, 1, 0]]), "For several labels per image set task='multilabel'"),
        ("multiclass", 3, torch.tensor([[1, 1, 0], [0, 1, 0]]), "must be class indices"),
        ("multiclass", 3, torch.tensor([0, 3]), "label 3 is not in 0..2"),
        ("multiclass", 3, torch.tensor([0.0, 1.0]), "float32 of the shape .2."),
    ],
)
def test_labels_of_another_kind_are_refused(
    tmp_path: Path, task: Any, classes: int, labels: Tensor, message: str
) -> None:
    outputs = 1 if task == "binary" else classes
    data = Given([(torch.zeros(2, outputs, 1, 1), labels)])
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, limit_val_batches=0).fit(ClassificationTask(Scores(), classes, task=task), data)
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path).validate(ClassificationTask(Scores(), classes, task=task), data, verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "binary"}, "num_classes must be 2 or None, got 10. Set task='multiclass' for more"),
        ({"task": "multi"}, "task must be 'multiclass', 'multilabel' or 'binary', got 'multi'"),
        ({"task": "multilabel", "num_classes": 1}, "num_classes must be 2 or more, got 1"),
        ({"task": "binary", "num_classes": 2, "class_weights": [1.0, 2.0]}, "1 number.*what positives count; got 2"),
    ],
)
def test_a_wrong_task_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_task(**options)


def test_a_network_with_other_outputs_is_refused(tmp_path: Path) -> None:
    data = Given([(torch.zeros(2, 2, 1, 1), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match=r"must return logits \[B, 1\] for task='binary'.*but returns \[2, 2\]"):
        small_trainer(tmp_path).validate(ClassificationTask(Scores(), task="binary"), data, verbose=False)
