"""Several trained classifiers as one."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning._float32 import at_least_float32
from dia_lightning.tasks._mean import Mean
from dia_lightning.tasks.base import brief
from dia_lightning.tasks.classification import ClassificationTask, Stage


class EnsembleTask(ClassificationTask):
    r"""Averages the class probabilities of trained classifiers in validation, test and predict; it is not trained.

    Logged are the metrics of :class:`ClassificationTask` for the ensemble (``test/acc``, ``test/loss``, ...), those of
    each member (``test/member0/acc``, ``test/member0/loss``, ``test/member0/brier``, ...) and an ambiguity
    decomposition. With the probabilities p of M members, their mean :math:`\bar p`, and y, which is 1 for the correct
    class (or labels) and 0 otherwise, each a vector over classes, for every image

    .. math:: \|\bar p - y\|^2 = \frac1M \sum_m \|p_m - y\|^2 - \frac1M \sum_m \|p_m - \bar p\|^2,

    the error of the ensemble (``brier``) is the mean error of its members (``brier_members``) minus their disagreement
    (``ambiguity``). This holds for the squared error of probabilities, summed over classes (the Brier score; for a
    binary task over both classes), but not for accuracy or cross-entropy.

    Args:
        members: two or more trained tasks of the same classes. Their networks may differ.

    Raises:
        ValueError: if there are fewer than two, or one is not a classifier or has different classes.

    Source:
        Krogh and Vedelsby, "Neural Network Ensembles, Cross Validation, and Active Learning", NIPS 7, 1995, for the
        squared error of one output.

    Example:
        >>> members = [ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}) for _ in range(2)]
        >>> EnsembleTask(members)(torch.zeros(3, 3, 32, 32)).softmax(1).shape
        torch.Size([3, 10])
    """

    def __init__(self, members: Sequence[ClassificationTask]) -> None:
        _check_same(members)
        first = members[0]
        super().__init__(nn.ModuleList(members), None if first.task == "binary" else first.num_classes, task=first.task)
        self._data = {**first._data}
        self.val_scores = _Scores(self, "val")
        self.test_scores = _Scores(self, "test")

    @property
    def members(self) -> list[ClassificationTask]:
        """Return the trained tasks."""
        return list(self.backbone.children())  # type: ignore[arg-type]

    def setup(self, stage: str) -> None:
        """Compare the data with those the members were trained on."""
        if stage == "fit":
            raise ValueError("An ensemble is not trained. Train its members one by one.")
        super().setup(stage)
        for member in self.members:
            self.on_load_checkpoint({"dia_data": member._data, "global_step": self.trained_steps})

    def save_pretrained(self, folder: str | os.PathLike[str], *, metrics: Mapping[str, float] | None = None) -> Path:
        """Refuse to write a folder that could not be loaded.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "An ensemble consists of its members, which one folder cannot hold. Save them one by one, and load "
            "them with EnsembleTask([ClassificationTask.from_pretrained(folder), ...])."
        )

    def member_logits(self, images: Tensor) -> Tensor:
        """Return the logits of all members ``[M, B, K]``, or ``[M, B]`` for a binary task."""
        return torch.stack([self._kind.logits(at_least_float32(member(images))) for member in self.members])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]``, or ``[B]`` for a binary task, whose probabilities are the mean of the members'."""
        return self._kind.average(self.member_logits(images))

    def _evaluate(self, batch: tuple[Tensor, ...], batch_index: int, stage: Stage) -> dict[str, Tensor]:
        self._check_images(batch[0], batch_index)
        logits = self.member_logits(batch[0])
        outputs = self._measure(batch, self._kind.average(logits), stage)
        counts = outputs["index"] >= 0
        scores = self.val_scores if stage == "val" else self.test_scores
        if counts.any():
            scores.update(logits[:, counts], self._kind.read(batch[1][counts], training=False))
        for name, metric in scores.named().items():
            self.log(f"{stage}/{name}", metric)
        return outputs


class _Scores(nn.Module):
    """Metrics of each member, and the ambiguity decomposition, for one stage."""

    def __init__(self, task: EnsembleTask, stage: Stage) -> None:
        super().__init__()
        self._kind = task._kind
        count = len(task.members)
        self.metrics = nn.ModuleList(task._metrics("") for _ in range(count))
        self.losses = nn.ModuleList(Mean() for _ in range(count))
        self.briers = nn.ModuleList(Mean() for _ in range(count))
        self.brier, self.brier_members, self.ambiguity = Mean(), Mean(), Mean()

    def named(self) -> dict[str, Any]:
        """Return all metrics by their names without the stage prefix."""
        found = {name: getattr(self, name) for name in ("brier", "brier_members", "ambiguity")}
        for i, (metrics, loss, brier) in enumerate(zip(self.metrics, self.losses, self.briers, strict=True)):
            of_member = {**dict(metrics.items()), "loss": loss, "brier": brier}  # type: ignore[operator]
            found |= {f"member{i}/{name}": metric for name, metric in of_member.items()}
        return found

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits of the members ``[M, B, ...]`` and labels ``[B, ...]``."""
        for of_member, metrics, loss in zip(logits, self.metrics, self.losses, strict=True):
            metrics.update(self._kind.scores(of_member), self._kind.hard(labels))  # type: ignore[operator]
            loss.update(self._kind.losses(of_member, labels))  # type: ignore[operator]
        probabilities, truth = self._kind.probabilities(logits), self._kind.truth(labels)
        mean = probabilities.mean(0)
        errors = (probabilities - truth).square().sum(-1)  # [M, B]
        for error, brier in zip(errors, self.briers, strict=True):
            brier.update(error)  # type: ignore[operator]
        self.brier.update((mean - truth).square().sum(-1))
        self.brier_members.update(errors.mean(0))
        self.ambiguity.update((probabilities - mean).square().sum(-1).mean(0))


def _check_same(members: Sequence[ClassificationTask]) -> None:
    for member in members:
        if not isinstance(member, ClassificationTask):
            raise ValueError(
                f"An ensemble averages class probabilities; a {type(member).__name__} is not a classifier."
            )
    if len(members) < 2 or len(set(map(id, members))) < len(members):
        raise ValueError(f"An ensemble needs two or more different members, got {len(members)}.")
    first = members[0]
    for i, member in enumerate(members):
        if (member.task, member.num_classes) != (first.task, first.num_classes):
            raise ValueError(
                f"Member {i} of the ensemble is {member.task} with {member.num_classes} classes, but member 0 is "
                f"{first.task} with {first.num_classes}. Take members that were trained on the same classes."
            )
        names = (first.class_names, member.class_names)
        if None not in names and names[0] != names[1]:
            raise ValueError(
                f"Member {i} of the ensemble knows the classes {brief(names[1] or [])}, but member 0 "
                f"{brief(names[0] or [])}. Take members that were trained on the same classes."
            )
