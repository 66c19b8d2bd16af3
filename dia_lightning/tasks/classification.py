"""Image classification."""

from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from typing_extensions import Unpack

from dia_lightning._float32 import at_least_float32
from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.models import get_model
from dia_lightning.tasks._batch_checks import check_dtype, naming_channels, pixel_range, raw_pixels
from dia_lightning.tasks._class_weights import (
    ClassWeights,
    check_class_weights,
    training_labels,
    warn_of_balanced_sampling,
    without_arrays,
)
from dia_lightning.tasks._compilation import Compile, parts_to_compile
from dia_lightning.tasks._head import drop_before_head
from dia_lightning.tasks._label_kinds import ImageTask, label_kind
from dia_lightning.tasks._mean import Mean
from dia_lightning.tasks._network import Backbone, images_like
from dia_lightning.tasks._weights import load_weights
from dia_lightning.tasks.base import DIATask
from dia_lightning.tasks.options import TaskOptions

Stage: TypeAlias = Literal["val", "test"]


class ClassificationTask(DIATask):
    """Trains a classifier, with or without attention.

    Logged: ``train/loss``, ``train/acc``; ``val/`` and ``test/`` followed by ``loss``, ``acc`` (the share of images
    classified correctly: micro top-1; with several labels, all must be correct) and

    - multiclass: ``acc_macro`` (mean over classes) and, for more than five classes, ``acc5`` (micro top-5);
    - multilabel: ``map`` (average precision, mean over labels) and ``f1`` (mean over labels);
    - binary: ``auroc``, ``ap`` (average precision) and ``f1``, of class 1.

    Training batches are ``(images [B, C, H, W], labels)``. Labels are class indices ``[B]`` (multiclass), 0 and 1
    ``[B, K]`` (multilabel) or 0 and 1 ``[B]`` (binary); in training also probabilities, as after mixup: ``[B, K]``, for
    a binary task ``[B]`` or ``[B, 2]``. Validation and test batches may carry the position of each image in its dataset
    as a third item, where -1 marks an image that only pads the batch of a distributed run and is not counted.

    Args:
        backbone: name of a network (see ``dia-lightning models``), or a network that returns logits ``[B, K]``, for a
            binary task ``[B, 1]``.
        num_classes: number of classes or labels K; 2 or omitted for a binary task.
        task: kind of labels, by torchmetrics' names: ``"multiclass"``, one class per image (cross-entropy);
            ``"multilabel"``, any number of labels per image, or ``"binary"``, one of two classes with a single logit
            (both: binary cross-entropy).
        image_shape: (C, H, W) of the images, used to find where a custom backbone takes attention. Data modules of
            this package provide it.
        backbone_args: further arguments of a named backbone, for example ``{"depth": 29}``.
        dropout: probability, in [0, 1), of dropping a value before the last linear layer in training, in addition to
            the network's own dropout (``backbone_args``: ``drop_rate`` and ``drop_path_rate`` of timm's networks,
            ``dropout`` and ``stochastic_depth_prob`` of some of torchvision's, ``dropout`` of ``cifar_wrn``).
        label_smoothing: in [0, 1).
        class_weights: K positive numbers that weigh images of each class in the training loss (``weight`` of
            :func:`torch.nn.functional.cross_entropy`), or ``"balanced"`` for N / (K * images of the class), counted in
            the training data. For a multilabel task, weights of the positives of each label; for a binary one, a single
            number for those of class 1 (``pos_weight``); balanced: negatives / positives. Validation and test losses
            are not weighted, so they can be compared.
        init_from: file whose weights the network starts from; unlike resuming, nothing else is taken from it.
        compile: ``True`` compiles the network when it first runs, ``"blocks"`` each of its residual blocks separately,
            which compiles faster because equal blocks are compiled once.
        **options: those of :class:`AttentionOptions` and of :class:`OptimizationOptions`.

    Raises:
        ValueError: if a name is unknown, a number is out of range, ``num_classes`` is missing, or
            ``compile="blocks"`` finds no residual block.

    Example:
        >>> import torch
        >>> task = ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}, attention="dia-lstm")
        >>> task(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int | None = None,
        *,
        task: ImageTask = "multiclass",
        image_shape: list[int] | None = None,
        backbone_args: dict[str, Any] | None = None,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights | None = None,
        init_from: str | None = None,
        compile: Compile = False,
        **options: Unpack[TaskOptions],
    ) -> None:
        class_weights = without_arrays(class_weights)
        arguments = dict(locals())
        super().__init__(**options)
        self.task = task
        self._kind = label_kind(task, num_classes)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
        if backbone_args and not isinstance(backbone, str):
            raise ValueError("backbone_args are for a named backbone; this one is an object. Omit them.")
        if backbone_args and "num_classes" in backbone_args:
            raise ValueError("backbone_args must not have num_classes: it is an argument of the task.")
        check_class_weights(class_weights, self._kind.outputs, self._kind.weights_for)
        self.remember(arguments)
        self._class_weights = class_weights
        self._loss_weight: Tensor | None = None  # set when training starts
        self.num_classes = self._kind.num_classes
        self.label_smoothing = label_smoothing
        check_is_no_mark("backbone", backbone)
        args = {"num_classes": self._kind.outputs, **(backbone_args or {})}
        self.backbone = get_model(backbone, **args) if isinstance(backbone, str) else backbone
        drop_before_head(self.backbone, self._kind.outputs, dropout)
        example = images_like(self.backbone, image_shape)
        parts = parts_to_compile(compile, self.backbone, self.backbone, example)
        self.attach_attention(self.backbone, example)
        if init_from is not None:
            rank_zero_info(load_weights(self.backbone, init_from))
        self.freeze_parameters()
        self.compile_parts(parts)
        self.train_metrics = MetricCollection({"acc": self._kind.accuracy()}, prefix="train/", compute_groups=False)
        self.val_metrics = self._metrics("val/")
        self.val_loss = Mean()
        self.test_metrics = self._metrics("test/")
        self.test_loss = Mean()
        self.confusion = self._kind.confusion()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]``, or ``[B, 1]`` for a binary task, of images ``[B, C, H, W]``."""
        with naming_channels(self.backbone, images):
            logits: Tensor = self.backbone(images)
        return logits

    def _check_images(self, images: Tensor, batch_index: int) -> None:
        check_dtype(images, self.backbone)
        if batch_index == 0:  # once per epoch, since it waits for the device
            self.tell("range", raw_pixels(images, *pixel_range(images)))

    def _metrics(self, prefix: str) -> MetricCollection:
        metrics: dict[str, Metric | MetricCollection] = {"acc": self._kind.accuracy(), **self._kind.further_metrics()}
        # Groups are found by states that are equal after the first batch. If all of it is correct, so are those of
        # different metrics, and one would take over the other's values.
        return MetricCollection(metrics, prefix=prefix, compute_groups=False)

    def evaluation_loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, summed over its images, without label smoothing or weights."""
        images, labels = batch[:2]
        logits = self._kind.logits(at_least_float32(self(images)))
        return self._kind.losses(logits, self._kind.read(labels, training=False)).sum()

    # ---- steps

    def on_train_start(self) -> None:
        """Count the classes of the training data if the weights depend on it."""
        super().on_train_start()
        self._weigh_classes()

    def _weigh_classes(self) -> None:
        weights = self._class_weights
        if weights == "balanced":
            warn_of_balanced_sampling(self.trainer)
            names = self.class_names or [str(label) for label in range(self.num_classes)]
            weights = self._kind.balanced(training_labels(self.trainer), names)
        if weights is not None:
            dtype = torch.promote_types(self.dtype, torch.float32)  # type: ignore[arg-type]
            self._loss_weight = torch.tensor(weights, device=self.device, dtype=dtype)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch[:2]
        self._check_images(images, batch_idx)
        if self._class_weights is not None and self._loss_weight is None:
            self._weigh_classes()  # a subclass may override on_train_start
        logits = self._kind.logits(at_least_float32(self(images)))
        labels = self._kind.read(labels, training=True)  # after the network has started, as it waits for the device
        labels = at_least_float32(labels) if labels.is_floating_point() else labels
        loss = self._kind.training_loss(logits, labels, weight=self._loss_weight, smoothing=self.label_smoothing)
        self.check_loss(loss, batch_idx)
        self.train_metrics.update(self._kind.scores(logits), self._kind.hard(labels))
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=False, prog_bar=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        """Update the metrics; return the index ``[B]`` and the class probabilities ``[B, K]`` of the images."""
        outputs = self._evaluate(batch, batch_idx, "val")
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log_dict(self.val_metrics, prog_bar=True)
        return outputs

    def on_test_epoch_start(self) -> None:
        """Start a new confusion matrix."""
        if self.confusion is not None:
            self.confusion.reset()
        super().on_test_epoch_start()

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        """Update the metrics; return the index ``[B]`` and the class probabilities ``[B, K]`` of the images."""
        outputs = self._evaluate(batch, batch_idx, "test")
        self.log("test/loss", self.test_loss)
        self.log_dict(self.test_metrics)
        return outputs

    def predict_step(self, batch: tuple[Tensor, ...] | Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the index ``[B]`` and the class probabilities ``[B, K]`` of images."""
        images, *rest = (batch,) if isinstance(batch, Tensor) else batch
        # Other packages' loaders return labels as the second item.
        index = rest[:1] if hasattr(getattr(self.trainer, "datamodule", None), "sample_name") else []
        self._check_images(images, batch_idx)
        logits = self._kind.logits(at_least_float32(self(images)))
        return {"index": self.sample_index(images, index), "probabilities": self._kind.probabilities(logits)}

    def _evaluate(self, batch: tuple[Tensor, ...], batch_index: int, stage: Stage) -> dict[str, Tensor]:
        self._check_images(batch[0], batch_index)
        return self._measure(batch, self._kind.logits(at_least_float32(self(batch[0]))), stage)

    def _measure(self, batch: tuple[Tensor, ...], logits: Tensor, stage: Stage) -> dict[str, Tensor]:
        images, labels, *rest = batch
        index = self.sample_index(images, rest)
        counts = index >= 0
        if counts.any():  # metrics reject an empty batch
            loss, metrics = (self.val_loss, self.val_metrics) if stage == "val" else (self.test_loss, self.test_metrics)
            counted = self._kind.read(labels[counts], training=False)
            scores, hard = self._kind.scores(logits[counts]), self._kind.hard(counted)
            loss.update(self._kind.losses(logits[counts], counted))
            metrics.update(scores, hard)
            if stage == "test" and self.confusion is not None:
                self.confusion.update(scores, hard)
        return {"index": index, "probabilities": self._kind.probabilities(logits)}
