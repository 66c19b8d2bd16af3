"""Several classifiers as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from dia_lightning.callbacks import ConfusionMatrix, PredictionWriter
from dia_lightning.tasks import ClassificationTask, EnsembleTask
from tests.tasks.conftest import Given, small_task, small_trainer
from tests.tasks.test_label_kinds import rows_of


class Linear(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(5, outputs)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = 3 * self.layer(images.flatten(1))
        return logits


def members_of(task: Any, classes: int, count: int = 3) -> list[ClassificationTask]:
    torch.manual_seed(0)
    outputs = 1 if task == "binary" else classes
    return [ClassificationTask(Linear(outputs), classes, task=task).eval() for _ in range(count)]


def batches(labels: Tensor) -> tuple[Tensor, Given]:
    """Return images, and batches of them with two that only fill up."""
    images = torch.randn(len(labels), 5, 1, 1)
    index = torch.arange(len(labels))
    padding = (images[:2], labels[:2], torch.tensor([-1, -1]))
    return images, Given([(images[:7], labels[:7], index[:7]), (images[7:], labels[7:], index[7:]), padding])


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
def test_probabilities_are_averaged_and_the_error_is_parted_exactly(tmp_path: Path, task: Any) -> None:
    classes = 2 if task == "binary" else 4
    labels = torch.randint(2, (20, classes)) if task == "multilabel" else torch.randint(classes, (20,))
    members = members_of(task, classes)
    ensemble, (images, data) = EnsembleTask(members), batches(labels)
    (result,) = small_trainer(tmp_path).test(ensemble, data, verbose=False)
    with torch.no_grad():
        logits = torch.stack([member(images) for member in members]).double()
    each = logits.softmax(-1) if task == "multiclass" else logits.sigmoid()
    if task == "binary":
        each = torch.cat([1 - each, each], -1)
    mean = each.mean(0)
    truth = labels if task == "multilabel" else nn.functional.one_hot(labels, classes)
    errors = (each - truth).square().sum(-1).mean(1)
    assert result["test/brier"] == pytest.approx((mean - truth).square().sum(-1).mean().item(), rel=1e-5)
    assert result["test/brier_members"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert result["test/brier"] == pytest.approx(result["test/brier_members"] - result["test/ambiguity"], rel=1e-5)
    assert result["test/ambiguity"] > 0.01
    for i, member in enumerate(members):
        assert result[f"test/member{i}/brier"] == pytest.approx(errors[i].item(), rel=1e-5)
        (alone,) = small_trainer(tmp_path).test(member, data, verbose=False)
        for name, value in alone.items():
            assert result[name.replace("test/", f"test/member{i}/")] == pytest.approx(value, rel=1e-5), name
    if task != "multilabel":
        assert result["test/acc"] == pytest.approx(accuracy_score(labels, mean.argmax(1)))
        assert result["test/loss"] == pytest.approx(log_loss(labels, mean, labels=range(classes)), rel=1e-5)
    outputs: Any = small_trainer(tmp_path).predict(ensemble, Given([images]))
    np.testing.assert_allclose(outputs[0]["probabilities"], mean, atol=1e-6)


def test_callbacks_see_one_classifier(tmp_path: Path) -> None:
    writer = PredictionWriter()
    ensemble = EnsembleTask(members_of("multiclass", 4))
    _, data = batches(torch.randint(4, (20,)))
    (result,) = small_trainer(tmp_path, callbacks=[ConfusionMatrix(), writer]).test(ensemble, data, verbose=False)
    rows = rows_of(writer.path)
    assert len(rows) == 20
    assert sum(row["true"] == row["label"] for row in rows) / 20 == pytest.approx(result["test/acc"])


def named(names: list[str]) -> ClassificationTask:
    (member,) = members_of("multiclass", len(names), 1)
    member._data["class_names"] = names
    return member


def test_members_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one, two = members_of("multiclass", 3, 2)
    with pytest.raises(ValueError, match="Member 1 of the ensemble is multiclass with 4 classes, but member 0 is"):
        EnsembleTask([one, *members_of("multiclass", 4, 1)])
    with pytest.raises(ValueError, match="Member 1 of the ensemble is multilabel with 3 classes"):
        EnsembleTask([one, *members_of("multilabel", 3, 1)])
    with pytest.raises(ValueError, match=r"knows the classes \[a, c\], but member 0 \[a, b\]"):
        EnsembleTask([named(["a", "b"]), named(["a", "c"])])
    with pytest.raises(ValueError, match="two or more different members, got 1"):
        EnsembleTask([one])
    with pytest.raises(ValueError, match="two or more different members, got 2"):
        EnsembleTask([one, one])
    with pytest.raises(ValueError, match="Linear is not a classifier"):
        EnsembleTask([one, Linear(3)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="An ensemble is not trained"):
        small_trainer(tmp_path).fit(EnsembleTask([one, two]), batches(torch.randint(3, (20,)))[1])
    with pytest.raises(ValueError, match="Save them one by one"):
        EnsembleTask([one, two]).save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_data_of_other_classes_than_the_members_are_refused(tmp_path: Path, digits: Any) -> None:
    members = [small_task(attention=None) for _ in range(2)]
    for member in members:
        member._data["class_names"] = [f"digit {label}" for label in range(10)]
    with pytest.raises(ValueError, match="Labels would be mixed up"):
        small_trainer(tmp_path).test(EnsembleTask(members), digits, verbose=False)
