"""Object detection and instance segmentation."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from typing_extensions import Unpack

from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.models.detectors import Detector, get_detector
from dia_lightning.tasks._batch_checks import (
    check_dtype,
    check_image_channels,
    not_in_unit_range,
    pixel_range,
    unusual_boxes,
)
from dia_lightning.tasks._compilation import Compile, parts_to_compile
from dia_lightning.tasks._detection_limits import crowding, detector_limits
from dia_lightning.tasks._freezing import has_statistics
from dia_lightning.tasks._mean import Mean
from dia_lightning.tasks._network import Backbone, images_like
from dia_lightning.tasks._targets import Target, check_targets
from dia_lightning.tasks._weights import load_detector_weights
from dia_lightning.tasks.base import DIATask
from dia_lightning.tasks.mean_average_precision import MeanAveragePrecision
from dia_lightning.tasks.options import OtherTaskOptions
from dia_lightning.tasks.precision import check_keeps_boxes

if TYPE_CHECKING:
    NamedDetector: TypeAlias = Detector | nn.Module
else:
    NamedDetector = Detector  # what the command line takes

Detections: TypeAlias = list[dict[str, Tensor]]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
#: Seed of the anchors and boxes that the losses of an evaluation are computed on.
_EVALUATION_SEED = 0


class DetectionTask(DIATask):
    """Trains a torchvision detector on any backbone, with or without attention.

    Logged: ``train/loss`` and each of its terms under torchvision's name (``train/loss_classifier``, ...); ``val/`` and
    ``test/`` followed by COCO's scores in [0, 1]: ``map`` (mean over IoU 0.5 to 0.95), ``map_50``, ``map_75``,
    ``map_small``, ``map_medium``, ``map_large``, ``mar_1``, ``mar_10``, ``mar_100``, ... and ``ap/<class>`` of boxes.
    Mask R-CNN has the overall scores for masks too, as ``mask_map``, ... A score that is undefined because there are no
    such objects is not logged, except ``map``, which is then NaN.

    Batches are those of :class:`~dia_lightning.datamodules.DetectionDataModule`: ``(images, targets)``, in validation
    and test with the position of each image in its dataset as a third item, where -1 marks an image that only pads the
    batch of a distributed run and is not counted. Images are a list of tensors ``[3, H, W]`` in [0, 1]; a target has
    ``boxes [N, 4]`` (x1, y1, x2, y2 in pixels), ``labels [N]`` in 1..K and for Mask R-CNN ``masks [N, H, W]``.

    Args:
        detector: ``"fasterrcnn"``, ``"maskrcnn"``, ``"retinanet"``, ``"fcos"`` or ``"ssdlite"``, see
            :func:`~dia_lightning.models.detectors.get_detector`; or a detector with torchvision's interface, which
            needs no ``backbone``.
        backbone: name of a network (see ``dia-lightning models``), or a network.
        num_classes: number of object classes K, without the background.
        backbone_args: further arguments of a named backbone, for example ``{"weights": "DEFAULT"}``; without them
            nothing is downloaded.
        detector_args: further arguments of a named detector, for example ``{"min_size": 480, "fpn_channels": 64}``.
        trainable_layers: how many layers of the backbone to train, counted from the end, the stem being one; attention
            in frozen layers is trained. ``None`` trains all.
        frozen_norm: freeze the statistics and weights of the backbone's batch norms.
        validation_loss: also log the losses of the validation data (``val/loss``, ...), which passes every image
            through the network a second time.
        max_detections: how many of the best detections per class count in an image's scores. COCO uses 100; more, which
            need faster-coco-eval, suit images with more objects, and ``mar_100`` gets the number in its name. The
            detector finds no more than its own limit, ``box_detections_per_img`` (R-CNNs), or ``detections_per_img``
            and ``topk_candidates`` per map of its pyramid (others), in ``detector_args``.
        init_from: file whose weights the network starts from: a checkpoint of this task, a state dict of torchvision's
            detector, or a classifier, whose weights go into the backbone.
        compile: ``True`` compiles the backbone with its feature pyramid when it first runs, ``"blocks"`` each residual
            block of the backbone separately, which compiles faster because equal blocks are compiled once. The heads
            are never compiled: their number of boxes changes from batch to batch.
        lr: learning rate, positive; the default suits SGD with 4 images per step.
        **options: those of :class:`AttentionOptions` and of :class:`OptimizationOptions`.

    Raises:
        ValueError: if a name is unknown, a number is out of range, ``num_classes`` is missing, or
            ``compile="blocks"`` finds no residual block.
        ImportError: if neither faster-coco-eval nor pycocotools is installed.

    Example:
        >>> import torch
        >>> small = {"backbone_args": {"depth": 11}, "detector_args": {"min_size": 64}}
        >>> task = DetectionTask("fcos", "cifar_resnet", 3, **small, attention="dia-lstm")
        >>> sorted(task.eval()([torch.rand(3, 64, 64)])[0])
        ['boxes', 'labels', 'scores']
    """

    def __init__(
        self,
        detector: NamedDetector,
        backbone: Backbone | None = None,
        num_classes: int | None = None,
        *,
        backbone_args: dict[str, Any] | None = None,
        detector_args: dict[str, Any] | None = None,
        trainable_layers: int | None = None,
        frozen_norm: bool = False,
        validation_loss: bool = False,
        max_detections: int = 100,
        init_from: str | None = None,
        compile: Compile = False,
        lr: float = 0.005,
        **options: Unpack[OtherTaskOptions],
    ) -> None:
        arguments = dict(locals())
        super().__init__(lr=lr, **options)
        if num_classes is None or num_classes < 1:
            raise ValueError(
                f"num_classes must be 1 or more, without the background, got {num_classes}. Data modules of this "
                "package provide it."
            )
        self.remember(arguments)
        self.num_classes = num_classes
        self.validation_loss = validation_loss
        body_options = {
            "backbone_args": backbone_args or {},
            "trainable_layers": trainable_layers,
            "frozen_norm": frozen_norm,
        }
        self.detector = _detector(detector, backbone, num_classes, body_options, detector_args or {})
        body = self.backbone
        example = images_like(body, None)
        parts = parts_to_compile(compile, self.detector.backbone, body, example)  # type: ignore[arg-type]
        self.attach_attention(body, example)
        if init_from is not None:
            rank_zero_info(load_detector_weights(self.detector, init_from))
        self.freeze_parameters()
        self.compile_parts(parts)
        self.has_masks = isinstance(self.detector, MaskRCNN)
        self.max_detections = max_detections
        self.val_map = MeanAveragePrecision(masks=self.has_masks, max_detections=max_detections)
        self.test_map = MeanAveragePrecision(masks=self.has_masks, max_detections=max_detections)
        # not by self.log per batch: its mean over processes divides by an integer number of images, rounded down
        self._val_losses: dict[str, Mean] = {}

    @property
    def backbone(self) -> nn.Module:
        """The network below the feature pyramid, or the whole backbone if it has none."""
        pyramid: Any = self.detector.backbone
        body: nn.Module = getattr(pyramid, "body", pyramid)
        return body

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of everything except the backbone."""
        inside = set(self.backbone.parameters())
        return [parameter for parameter in self.parameters() if parameter not in inside]

    @property
    def category_ids(self) -> list[int] | None:
        """Ids of labels 1..K in the user's files, from the data module or the checkpoint."""
        return self._data.get("category_ids")

    def forward(self, images: Sequence[Tensor]) -> Detections:
        """Return the detections of images ``[3, H, W]`` in [0, 1], in evaluation mode.

        Returns:
            Per image ``boxes [N, 4]`` in its pixels, ``labels [N]`` in 1..K, ``scores [N]`` in [0, 1], best first, and
            with Mask R-CNN ``masks [N, 1, H, W]`` in [0, 1].
        """
        detections: Detections = self.detector(list(images))
        # RetinaNet and FCOS also score the background
        return [{name: values[found["labels"] > 0] for name, values in found.items()} for found in detections]

    def setup(self, stage: str) -> None:
        """Take class names and categories from the data module, and refuse a precision that rounds boxes."""
        check_keeps_boxes(self.trainer)
        super().setup(stage)

    def _check_batch(self, images: Sequence[Tensor], targets: Sequence[Target] | None, batch_index: int) -> None:
        """Refuse unsuitable images; the check of an epoch's first batch waits for the device."""
        check_dtype(images, self.detector)
        check_image_channels(images, self.detector)
        if batch_index > 0:
            return
        ends = pixel_range(images)
        transform: Any = getattr(self.detector, "transform", None)
        if any(getattr(transform, "image_mean", [1])):  # otherwise normalisation is left to the user
            self.tell("range", not_in_unit_range(*ends))
        if targets is not None:
            check_targets(targets, images=len(images), num_classes=self.num_classes, masks=self.has_masks)
            self.tell("boxes", unusual_boxes(images, targets))

    # ---- losses

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return torchvision's losses by name; the detector must be in training mode.

        Raises:
            ValueError: if a target is invalid.
        """
        check_targets(targets, images=len(images), num_classes=self.num_classes, masks=self.has_masks)
        losses: dict[str, Tensor] = self.detector(list(images), [dict(target) for target in targets])
        return losses

    def _losses_in_evaluation(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        # torchvision returns losses only in training mode, which must not affect the backbone, norms, dropout, the size
        # of the images or the random numbers of the training
        kept = {*self.detector.backbone.modules(), self.detector.transform}  # type: ignore[union-attr]
        kept |= {part for part in self.detector.modules() if has_statistics(part) or isinstance(part, _DROPOUTS)}
        changed = [module for module in self.detector.modules() if module not in kept and not module.training]
        for module in changed:
            module.training = True
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                return self.losses(images, [_as_in_training(target) for target in targets])
        finally:
            for module in changed:
                module.training = False

    def evaluation_loss(self, batch: Any) -> Tensor:
        """Return the sum of torchvision's losses of a batch times its images, with fixed draws of anchors and boxes.

        torchvision divides by the number of images, or of the boxes drawn from them.
        """
        images, targets = batch[:2]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(_EVALUATION_SEED)
            losses = self._losses_in_evaluation(images, targets)
        return torch.stack(list(losses.values())).sum() * len(images)

    # ---- steps

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        """Return the sum of the losses of a batch."""
        images, targets = batch[:2]
        self._check_batch(images, targets, batch_idx)
        losses = self.losses(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.check_loss(loss, batch_idx, losses)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        self.log_dict({f"train/{name}": term.detach() for name, term in losses.items()}, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Any, ...], batch_idx: int) -> dict[str, Any]:
        """Update the metric; return the index ``[B]`` and the detections of the images."""
        return self._evaluate(batch, batch_idx, self.val_map, with_losses=self.validation_loss)

    def test_step(self, batch: tuple[Any, ...], batch_idx: int) -> dict[str, Any]:
        """Update the metric; return the index ``[B]`` and the detections of the images."""
        return self._evaluate(batch, batch_idx, self.test_map)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return the index ``[B]`` and the detections of images."""
        images, *rest = batch if isinstance(batch, tuple) else (batch,)
        # loaders of other packages give targets as the second item
        index = rest[:1] if hasattr(getattr(self.trainer, "datamodule", None), "sample_name") else []
        self._check_batch(images, None, batch_idx)
        return {"index": self.sample_index(images, index), "detections": self(images)}

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted epoch has left."""
        super().on_validation_epoch_start()
        self.val_map.reset()
        self._val_losses.clear()

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted epoch has left."""
        super().on_test_epoch_start()
        self.test_map.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the scores and losses of the epoch."""
        self._log_scores("val", self.val_map)
        for name, mean in self._val_losses.items():
            self.log(f"val/{name}", mean.compute(), sync_dist=True)
        self._val_losses.clear()

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("test", self.test_map)

    def _evaluate(
        self, batch: tuple[Any, ...], batch_index: int, metric: MeanAveragePrecision, *, with_losses: bool = False
    ) -> dict[str, Any]:
        images, targets, *rest = batch
        self._check_batch(images, targets, batch_index)
        check_targets(targets, images=len(images), num_classes=self.num_classes, masks=self.has_masks)
        index = self.sample_index(images, rest)
        if with_losses:
            self._add_losses(images, targets, index)
        detections = self(images)
        metric.add(detections, targets, index)
        return {"index": index, "detections": detections}

    def _add_losses(self, images: Sequence[Tensor], targets: Sequence[Target], index: Tensor) -> None:
        counted = [number for number, position in enumerate(index.tolist()) if position >= 0]
        chosen = counted or range(len(images))  # with weight 0, because all processes need the same names
        losses = self._losses_in_evaluation([images[i] for i in chosen], [targets[i] for i in chosen])
        losses["loss"] = torch.stack(list(losses.values())).sum()
        for name, term in losses.items():
            self._val_losses.setdefault(name, Mean().to(self.device)).update(term, len(counted))

    def _log_scores(self, stage: str, metric: MeanAveragePrecision) -> None:
        scores = metric.compute()
        metric.reset()
        overall = scores.overall
        crowded = crowding(scores.crowd, self.max_detections, detector_limits(self.detector))
        self.tell("crowding", crowded and f"{stage}/map is lower than it could be. {crowded}")
        if "map" not in overall:
            rank_zero_warn(f"The {stage} images have no object, so mAP is not defined and {stage}/map is NaN.")
            overall = {**overall, "map": math.nan}  # for ModelCheckpoint, which takes it as the worst value
        shown = {f"{stage}/map", f"{stage}/map_50"}
        for name, value in self._named(stage, overall, scores.per_class).items():
            self.log(name, value, prog_bar=name in shown, sync_dist=True)

    def _named(self, stage: str, overall: Mapping[str, float], per_class: Mapping[int, float]) -> dict[str, float]:
        names = self.class_names or []
        values = {f"{stage}/{name}": value for name, value in overall.items()}
        for label, value in per_class.items():
            name = names[label - 1] if 0 < label <= len(names) else str(label)
            values[f"{stage}/ap/{name.replace('/', '_')}"] = value
        return values


def _as_in_training(target: Target) -> Target:
    """Return a target without crowds, which are not used in training."""
    wanted = {name: target[name] for name in target if name not in ("iscrowd", "area")}
    if "iscrowd" not in target:
        return wanted
    objects = [name for name in ("boxes", "labels", "masks") if name in wanted]
    return {**wanted, **{name: wanted[name][target["iscrowd"] == 0] for name in objects}}


def _detector(
    detector: str | nn.Module,
    backbone: str | nn.Module | None,
    num_classes: int,
    options: dict[str, Any],
    detector_args: dict[str, Any],
) -> nn.Module:
    check_is_no_mark("detector", detector)
    check_is_no_mark("backbone", backbone)
    for name in ("backbone", "num_classes", *options):
        if name in detector_args:
            raise ValueError(f"detector_args must not have {name}: give it as {name} of the task.")
    options = {**options, **detector_args}
    if isinstance(detector, nn.Module):
        given = [name for name, value in options.items() if value is not None and value is not False and value != {}]
        given += ["backbone"] if backbone is not None else []
        if given:
            raise ValueError(f"{', '.join(given)}: only for a named detector; this one is an object. Omit it.")
        return detector.train()  # Lightning keeps the mode, and losses are computed in this one
    if backbone is None:
        raise ValueError("backbone must be a name or a network, got None. Use torchvision/resnet50, for example.")
    if isinstance(backbone, nn.Module) and options["backbone_args"]:
        raise ValueError("backbone_args are for a named backbone; this one is an object. Omit them.")
    return get_detector(detector, backbone, num_classes=num_classes, **options)  # type: ignore[arg-type]
