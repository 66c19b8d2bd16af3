"""The kinds of image labels (one class of many, any number of labels, or yes and no), with loss and metrics."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryConfusionMatrix,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)

from dia_lightning.tasks._batch_checks import class_numbers
from dia_lightning.tasks._class_weights import balanced_weights, told

ImageTask: TypeAlias = Literal["multiclass", "multilabel", "binary"]


class LabelKind(ABC):
    """Loss, probabilities and metrics for one kind of labels.

    Metrics are created with ``validate_args=False``, because validation would wait for the device at every batch;
    :meth:`read` checks labels once.

    Args:
        num_classes: number of classes or labels K.
    """

    name: ImageTask
    weights_for = "one per class"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.outputs = num_classes  # of the network

    def logits(self, output: Tensor) -> Tensor:
        """Return the logits ``[B, K]``, or ``[B]`` of a binary task.

        Raises:
            ValueError: if the network returns something else.
        """
        if output.ndim != 2 or output.shape[1] != self.outputs:
            raise ValueError(
                f"The network must return logits [B, {self.outputs}] for task={self.name!r} and num_classes="
                f"{self.num_classes}, but returns {list(output.shape)}. Build it for {self.outputs} output(s)."
            )
        return output

    @abstractmethod
    def read(self, labels: Tensor, *, training: bool) -> Tensor:
        """Return labels as the loss takes them; training labels may be probabilities, as mixup makes them.

        Raises:
            ValueError: if their shape or a value is wrong.
        """

    @abstractmethod
    def training_loss(self, logits: Tensor, labels: Tensor, *, weight: Tensor | None, smoothing: float) -> Tensor:
        """Return the mean loss of a batch."""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image ``[B]``, without weights or smoothing."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities ``[B, K]`` of the classes or labels."""

    @abstractmethod
    def truth(self, labels: Tensor) -> Tensor:
        """Return what the probabilities ``[B, K]`` of a perfect classifier would be."""

    @abstractmethod
    def average(self, logits: Tensor) -> Tensor:
        """Return logits whose probabilities are the mean over M members ``[M, B, ...]``."""

    @abstractmethod
    def accuracy(self) -> Metric:
        """Return the metric for the share of images classified correctly."""

    @abstractmethod
    def further_metrics(self) -> dict[str, Metric]:
        """Return the metrics of evaluation besides accuracy, by name."""

    @abstractmethod
    def balanced(self, labels: Tensor, names: Sequence[str]) -> list[float]:
        """Return weights that balance the class frequencies of all training labels."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return the predictions for the metrics, which would take logits in [0, 1] for probabilities."""
        return logits

    def hard(self, labels: Tensor) -> Tensor:
        """Return labels, which may be probabilities, as integers for metrics."""
        return (labels > 0.5).long()

    def confusion(self) -> Metric | None:
        """Return the metric that counts predicted classes per true class, if images have one class each."""
        return None

    def _wrong(self, wanted: str, labels: Tensor, hint: str) -> ValueError:
        got = f"{list(labels.shape)} of {str(labels.dtype).removeprefix('torch.')}"
        if labels.numel() > 0:
            got += f" from {labels.min():.4g} to {labels.max():.4g}"
        return ValueError(f"Labels must be {wanted} for task={self.name!r}, got {got}. {hint}")


class Multiclass(LabelKind):
    """Every image has one class: cross-entropy."""

    name: ImageTask = "multiclass"

    def read(self, labels: Tensor, *, training: bool) -> Tensor:
        if labels.ndim == 1:
            return class_numbers(labels, self.num_classes, look=True)
        is_soft = training and labels.is_floating_point() and labels.shape[1:] == (self.num_classes,)
        # with tolerance for labels rounded to half precision
        if is_soft and bool(((labels >= 0).all(1) & ((labels.sum(1) - 1).abs() < 0.05)).all()):
            return labels
        soft = f", or probabilities [B, {self.num_classes}] that sum to 1," if training else ""
        raise self._wrong(f"class indices [B]{soft}", labels, "For several labels per image set task='multilabel'.")

    def training_loss(self, logits: Tensor, labels: Tensor, *, weight: Tensor | None, smoothing: float) -> Tensor:
        return F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def truth(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, self.num_classes).float()

    def average(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))

    def hard(self, labels: Tensor) -> Tensor:
        return labels if labels.ndim == 1 else labels.argmax(1)

    def accuracy(self) -> Metric:
        return self._accuracy("micro")

    def further_metrics(self) -> dict[str, Metric]:
        metrics = {"acc_macro": self._accuracy("macro")}
        if self.num_classes > 5:
            metrics["acc5"] = self._accuracy("micro", top_k=5)
        return metrics

    def _accuracy(self, average: Literal["micro", "macro"], top_k: int = 1) -> Metric:
        return MulticlassAccuracy(self.num_classes, average=average, top_k=top_k, validate_args=False)

    def confusion(self) -> Metric:
        return MulticlassConfusionMatrix(self.num_classes, validate_args=False)

    def balanced(self, labels: Tensor, names: Sequence[str]) -> list[float]:
        return balanced_weights(labels, self.num_classes, names)


class Multilabel(LabelKind):
    """Every image has any number of labels: binary cross-entropy, mean over labels."""

    name: ImageTask = "multilabel"
    weights_for = "one per label: what its positives count"

    def read(self, labels: Tensor, *, training: bool) -> Tensor:
        shape = f"[B, {self.num_classes}]"
        if labels.ndim == 2 and labels.shape[1] == self.num_classes and _are_zero_or_one(labels, soft=training):
            return labels
        hint = f"Give every image {self.num_classes} numbers, 1 where it has the label, 0 where not."
        if labels.ndim == 1:
            hint += " For one class index per image set task='multiclass'."
        raise self._wrong(f"{shape} of 0 and 1", labels, hint)

    def training_loss(self, logits: Tensor, labels: Tensor, *, weight: Tensor | None, smoothing: float) -> Tensor:
        smooth = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weight)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return each.mean(1) if each.ndim == 2 else each

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def truth(self, labels: Tensor) -> Tensor:
        return labels.float()

    def average(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def accuracy(self) -> Metric:
        return MultilabelExactMatch(self.num_classes, validate_args=False)

    def further_metrics(self) -> dict[str, Metric]:
        return {
            "map": MultilabelAveragePrecision(self.num_classes, average="macro", validate_args=False),
            "f1": MultilabelF1Score(self.num_classes, average="macro", validate_args=False),
        }

    def balanced(self, labels: Tensor, names: Sequence[str]) -> list[float]:
        positive = self.read(labels, training=True).double().reshape(len(labels), -1).sum(0)
        return told(((len(labels) - positive) / positive).tolist(), names, "training images do not differ in")


class Binary(Multilabel):
    """Every image is one of two: a single logit, that of class 1."""

    name: ImageTask = "binary"
    weights_for = "what positives count"

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.outputs = 1

    def logits(self, output: Tensor) -> Tensor:
        return output if output.ndim == 1 else super().logits(output)[:, 0]

    def read(self, labels: Tensor, *, training: bool) -> Tensor:
        is_mixed = training and labels.is_floating_point() and labels.shape[1:] == (2,)
        positive = labels[:, 1] if is_mixed else labels
        if positive.ndim == 1 and _are_zero_or_one(positive, soft=training):
            return positive
        hint = "Take labels.squeeze(1)." if labels.shape[1:] == (1,) else "1 stands for the second class."
        raise self._wrong("[B] of 0 and 1", labels, hint)

    def probabilities(self, logits: Tensor) -> Tensor:
        positive = logits.sigmoid()
        return torch.stack([1 - positive, positive], -1)

    def truth(self, labels: Tensor) -> Tensor:
        return torch.stack([1 - labels, labels], -1).float()

    def accuracy(self) -> Metric:
        return BinaryAccuracy(validate_args=False)

    def further_metrics(self) -> dict[str, Metric]:
        return {
            "auroc": BinaryAUROC(validate_args=False),
            "ap": BinaryAveragePrecision(validate_args=False),
            "f1": BinaryF1Score(validate_args=False),
        }

    def confusion(self) -> Metric:
        return BinaryConfusionMatrix(validate_args=False)

    def balanced(self, labels: Tensor, names: Sequence[str]) -> list[float]:
        return super().balanced(labels, names[1:])


def label_kind(task: ImageTask, num_classes: int | None) -> LabelKind:
    """Return the kind of labels of a task.

    Raises:
        ValueError: if there is no such task, or the number of classes is wrong for it.
    """
    if task == "binary":
        if num_classes not in (None, 2):
            raise ValueError(
                f"task='binary' is for two classes, so num_classes must be 2 or None, got {num_classes}. Set "
                "task='multiclass' for more."
            )
        return Binary()
    kinds: dict[str, type[LabelKind]] = {"multiclass": Multiclass, "multilabel": Multilabel}
    if task not in kinds:
        raise ValueError(f"task must be 'multiclass', 'multilabel' or 'binary', got {task!r}.")
    if num_classes is None or num_classes < 2:
        raise ValueError(f"num_classes must be 2 or more, got {num_classes}. Data modules of this package provide it.")
    return kinds[task](num_classes)


def _are_zero_or_one(labels: Tensor, *, soft: bool) -> bool:
    """Return whether all labels are 0 or 1 or, if soft, between; NaN is neither."""
    if soft and labels.is_floating_point():
        return bool(((labels >= 0) & (labels <= 1)).all())
    return bool(((labels == 0) | (labels == 1)).all())
