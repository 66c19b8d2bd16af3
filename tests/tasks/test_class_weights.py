"""Weights of classes in the training loss."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import Callback
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask
from dia_lightning.tasks._class_weights import training_labels
from tests.tasks.conftest import Given, small_task, small_trainer
from tests.tasks.test_classification import Scores

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])


class Targets(Dataset[Any]):
    """A data set as torchvision's."""

    def __init__(self, labels: Any, **options: Any) -> None:
        self.targets = labels
        vars(self).update(options)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3, 1, 1), int(self.targets[index])


class FirstLoss(Callback):
    """Notes the weights of the loss and the loss of the first batch."""

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.weights, self.loss, self.batch = task._loss_weight, float(outputs["loss"]), batch


def first_loss(folder: Path, task: ClassificationTask, data: Any) -> FirstLoss:
    seen = FirstLoss()
    small_trainer(folder, limit_val_batches=0, callbacks=[seen]).fit(task, data)
    return seen


def sklearns(labels: Any, count: int) -> list[float]:
    weights: list[float] = compute_class_weight("balanced", classes=np.arange(count), y=np.asarray(labels)).tolist()
    return weights


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_weights_are_those_of_torchs_cross_entropy_in_training_and_none_in_evaluation(
    tmp_path: Path, precision: Any
) -> None:
    weights: Any = np.array([1.0, 2.0, 0.5])
    for labels in (torch.tensor([0, 1, 2, 1]), torch.rand(4, 3).softmax(1)):
        batch = (torch.randn(4, 3, 1, 1), labels)
        task = ClassificationTask(Scores(), 3, class_weights=weights, label_smoothing=0.1, lr=1e-9)
        seen = FirstLoss()
        trainer = small_trainer(tmp_path, limit_val_batches=0, callbacks=[seen], precision=precision)
        trainer.fit(task, Given([batch]))
        wanted = F.cross_entropy(batch[0].flatten(1), labels, weight=torch.tensor(weights).float(), label_smoothing=0.1)
        assert seen.loss == pytest.approx(wanted.item(), rel=1e-5 if precision == "32-true" else 2e-2)
        images, hard = batch[0], labels if labels.ndim == 1 else labels.argmax(1)
        (result,) = small_trainer(tmp_path).validate(task, Given([(images, hard)]), verbose=False)
        assert result["val/loss"] == pytest.approx(F.cross_entropy(images.flatten(1), hard).item(), rel=2e-2)


def test_balanced_ones_are_scikit_learns_of_the_training_images_and_survive_a_checkpoint(tmp_path: Path) -> None:
    data = DigitsDataModule(image_size=8, batch_size=16, limit=87, val_split=0.3)
    trainer = small_trainer(tmp_path)
    task = small_task(class_weights="balanced")
    trainer.fit(task, data)
    labels = [label for _, label in [data._dataset("train")[i] for i in range(len(data._dataset("train")))]]
    assert task._loss_weight is not None
    assert task._loss_weight.tolist() == pytest.approx(sklearns(labels, 10))
    assert len(set(labels)) == 10
    assert len(labels) == 87
    loaded = ClassificationTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.hparams["class_weights"] == "balanced"
    again = first_loss(tmp_path / "again", loaded, DigitsDataModule(image_size=8, batch_size=16, limit=87))
    assert again.weights.shape == (10,)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(Targets(LABELS.tolist()), id="list"),
        pytest.param(Targets(LABELS), id="tensor"),
        pytest.param(Targets((LABELS + 1).tolist(), target_transform=lambda label: label - 1), id="transformed"),
        pytest.param(TensorDataset(torch.zeros(7, 3, 1, 1), LABELS), id="tensors"),
        pytest.param([(torch.zeros(3, 1, 1), int(label)) for label in LABELS], id="samples"),
        pytest.param(Subset(Targets([1, *LABELS, 1]), range(1, 8)), id="subset"),
        pytest.param(ConcatDataset([Targets(LABELS[:3]), Targets(LABELS[3:])]), id="parts"),
    ],
)
def test_plain_loaders_tell_the_labels_where_their_data_do(tmp_path: Path, data: Any) -> None:
    task = ClassificationTask(Scores(), 3, class_weights="balanced")
    seen = first_loss(tmp_path, task, DataLoader(data, 7, collate_fn=lambda batch: (torch.zeros(7, 3, 1, 1), LABELS)))
    assert seen.weights.tolist() == pytest.approx(sklearns(LABELS, 3))


def test_samples_that_a_sampler_leaves_out_do_not_count(tmp_path: Path) -> None:
    data, sampler = Targets([*LABELS, 1, 1]), SubsetRandomSampler(range(7))
    task = ClassificationTask(Scores(), 3, class_weights="balanced")
    for loader in (
        DataLoader(data, 7, sampler=sampler),
        DataLoader(data, batch_sampler=BatchSampler(sampler, 7, False)),
    ):
        seen = first_loss(tmp_path, task, loader)
        assert seen.weights.tolist() == pytest.approx(sklearns(LABELS, 3))
    wrapped = DistributedSamplerWrapper(sampler, num_replicas=2, rank=1)  # as Lightning does with several processes
    trainer: Any = SimpleNamespace(train_dataloader=DataLoader(data, 7, sampler=wrapped))
    assert training_labels(trainer).tolist() == LABELS.tolist()


def test_a_sampler_that_makes_up_for_rare_classes_is_one_remedy_too_many(tmp_path: Path) -> None:
    loader = DataLoader(Targets(LABELS), 7, sampler=WeightedRandomSampler([1.0] * 7, 7))
    task = ClassificationTask(Scores(), 3, class_weights="balanced")
    with pytest.warns(UserWarning, match="'balanced' and the WeightedRandomSampler of the loader both make up"):
        first_loss(tmp_path, task, loader)


def test_class_probabilities_count_in_parts(tmp_path: Path) -> None:
    soft = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    task = ClassificationTask(Scores(), 2, class_weights="balanced")
    seen = first_loss(tmp_path, task, DataLoader(TensorDataset(torch.zeros(2, 2, 1, 1), soft), 2))
    assert seen.weights.tolist() == pytest.approx([2 / (2 * 1.5), 2 / (2 * 0.5)])


def test_a_class_without_images_is_named_and_weighs_one(tmp_path: Path) -> None:
    task = ClassificationTask(Scores(), 4, class_weights="balanced")
    loader = DataLoader(TensorDataset(torch.zeros(7, 4, 1, 1), LABELS), 7)
    with pytest.warns(UserWarning, match=r"no training image has 3 \(1 of 4 classes\), whose weight is 1"):
        seen = first_loss(tmp_path, task, loader)
    assert seen.weights.tolist() == pytest.approx([7 / 16, 7 / 8, 7 / 4, 1.0])


class Silent(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3, 1, 1), index


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            DataLoader(Silent(), 2),
            "needs the label of every training image, which Silent does not provide. Give it an attr",
        ),
        (Given([(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]))]), "which list does not provide"),
        ([DataLoader(Targets(LABELS), 2)] * 2, "which list does not provide"),
        (DataLoader(Targets([0, 3])), "label 3 is not in 0..2 .num_classes=3."),
        (DataLoader(TensorDataset(torch.zeros(2, 3, 1, 1), torch.zeros(2, 5))), r"the labels are \[2, 5\]"),
    ],
)
def test_labels_that_nobody_knows_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    task = ClassificationTask(Scores(), 3, class_weights="balanced")
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, limit_val_batches=0).fit(task, data)
    assert task.global_step == 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"class_weights must have 3 number\(s\), one per class; got 2"),
        ([1.0, 2.0, 0.0], r"must be 'balanced' or a list of positive numbers, got \[1.0, 2.0, 0.0\]"),
        ([1.0, 2.0, float("nan")], "list of positive numbers"),
        ("balance", "got 'balance'"),
        (2.0, "got 2.0"),
    ],
)
def test_wrong_weights_are_refused_when_the_task_is_made(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationTask(Scores(), 3, class_weights=weights)
