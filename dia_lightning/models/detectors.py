"""torchvision detectors on any backbone of ``get_model``."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from dia_lightning._choices import check_choice
from dia_lightning.models._box_coding import decode_in_full_precision
from dia_lightning.models._feature_pyramid import Level, PyramidBackbone, feature_body, freeze, freeze_norms

Detector = Literal["fasterrcnn", "maskrcnn", "retinanet", "fcos", "ssdlite"]
_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "fasterrcnn": FasterRCNN,
    "maskrcnn": MaskRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
    "ssdlite": SSD,
}
_SSDLITE_BACKBONE = "torchvision/mobilenet_v3_large"
#: Arguments of torchvision's classes that are made here.
_MADE_HERE = {
    "self", "backbone", "num_classes", "size", "rpn_anchor_generator", "rpn_head", "anchor_generator", "head", "kwargs",
    "box_roi_pool", "box_head", "box_predictor", "mask_roi_pool", "mask_head", "mask_predictor", "proposal_matcher",
}  # fmt: skip


def get_detector(
    detector: Detector,
    backbone: str | nn.Module,
    *,
    num_classes: int,
    backbone_args: dict[str, Any] | None = None,
    trainable_layers: int | None = None,
    frozen_norm: bool = False,
    fpn_channels: int = 256,
    anchor_sizes: Sequence[Sequence[int]] | None = None,
    representation_size: int = 1024,
    **detector_args: Any,
) -> nn.Module:
    """Build a torchvision detector on a backbone, with fresh weights unless ``backbone_args`` ask for others.

    With ``torchvision/resnet50`` and the defaults, the network and the names of its weights are those of torchvision's
    ``fasterrcnn_resnet50_fpn``, ``maskrcnn_resnet50_fpn``, ``retinanet_resnet50_fpn`` and ``fcos_resnet50_fpn``.

    Args:
        detector: ``"fasterrcnn"``, ``"maskrcnn"`` (with masks), ``"retinanet"``, ``"fcos"``, or ``"ssdlite"``, which
            torchvision builds on ``torchvision/mobilenet_v3_large`` and 320x320 pixels only.
        backbone: the name of a :func:`get_model` network with stages of decreasing resolution, or such a network, or a
            module with ``out_channels`` that returns feature maps by name, which is used unchanged.
        num_classes: number of object classes, K, without the background.
        backbone_args: further arguments of a named backbone, for example ``{"weights": "DEFAULT"}``.
        trainable_layers: how many layers of the backbone to train, counted from the end as in torchvision: each stage
            is one and the stem is one. ``None`` trains all.
        frozen_norm: freeze the statistics and weights of the backbone's batch norms; usual with pretrained backbones
            and small batches.
        fpn_channels: width of the feature pyramid.
        anchor_sizes: sides of the anchors in pixels, per map of the pyramid. ``None`` derives them from the strides: 8
            strides for R-CNNs, 4 strides and two sizes between for RetinaNet, the stride for FCOS.
        representation_size: width of the two linear layers of an R-CNN's box head.
        **detector_args: arguments of torchvision's class, for example ``min_size``, ``max_size``,
            ``box_detections_per_img`` (R-CNNs) or ``score_thresh`` (others).

    Returns:
        A network that maps a list of images ``[3, H, W]`` in [0, 1], and targets in training, to losses (training) or
        detections. Labels are 1..K.

    Raises:
        ValueError: if a name is unknown, or an argument is invalid.

    Example:
        >>> import torch
        >>> network = get_detector("fcos", "cifar_resnet", num_classes=3, backbone_args={"depth": 11}, min_size=64)
        >>> [sorted(found) for found in network.eval()([torch.rand(3, 64, 96)])]
        [['boxes', 'labels', 'scores']]
    """
    check_choice("detector", detector, get_args(Detector))
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, without the background, got {num_classes}.")
    given = {
        "representation_size": representation_size,
        "anchor_sizes": anchor_sizes,
        "fpn_channels": fpn_channels,
        "trainable_layers": trainable_layers,
        "frozen_norm": frozen_norm,
        "backbone_args": backbone_args or None,
    }
    _check_arguments(detector, detector_args)
    is_rcnn = detector in ("fasterrcnn", "maskrcnn")
    if detector == "ssdlite":
        _refuse_unused(given, [name for name in given if name != "backbone_args"], "ssdlite")
        return decode_in_full_precision(_ssdlite(backbone, num_classes, backbone_args or {}, detector_args))
    if isinstance(backbone, nn.Module) and hasattr(backbone, "out_channels"):
        _refuse_unused(given, list(given), "a backbone with out_channels, which is used unchanged")
        return decode_in_full_precision(_CLASSES[detector](backbone, num_classes + 1, **detector_args))
    if not is_rcnn:
        _refuse_unused(given, ["representation_size"], detector)
    if detector == "fcos" and fpn_channels % 32 != 0:  # the groups of its norms
        raise ValueError(f"fpn_channels must be a multiple of 32 for fcos, got {fpn_channels}.")
    body, levels = feature_body(backbone, backbone_args or {}, count=4 if is_rcnn else 3)
    if frozen_norm:
        freeze_norms(body)
    if trainable_layers is not None:
        freeze(body, trainable_layers)
    extra = LastLevelMaxPool() if is_rcnn else LastLevelP6P7(fpn_channels, fpn_channels)
    pyramid = PyramidBackbone(body, levels, fpn_channels, extra)
    anchors = _anchors(detector, levels, anchor_sizes)
    if is_rcnn:
        parts = {"rpn_anchor_generator": anchors, **_pooling(detector, len(levels))}
        network = _CLASSES[detector](pyramid, num_classes + 1, **parts, **detector_args)
        if representation_size != 1024:  # fixed in torchvision
            heads: Any = network.roi_heads
            heads.box_head = TwoMLPHead(fpn_channels * 7**2, representation_size)
            heads.box_predictor = FastRCNNPredictor(representation_size, num_classes + 1)
    else:
        network = _CLASSES[detector](pyramid, num_classes + 1, anchor_generator=anchors, **detector_args)
    return decode_in_full_precision(network)


def _pooling(detector: Detector, levels: int) -> dict[str, nn.Module]:
    """Return torchvision's region pooling over all maps except the one added by the extra block."""
    names = [str(index) for index in range(levels)]
    pools = {"box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)}
    if detector == "maskrcnn":
        pools["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    return pools


def _ssdlite(
    backbone: str | nn.Module, num_classes: int, backbone_args: dict[str, Any], args: dict[str, Any]
) -> nn.Module:
    if backbone != _SSDLITE_BACKBONE:
        name = backbone if isinstance(backbone, str) else type(backbone).__name__
        raise ValueError(
            f"ssdlite is built by torchvision on {_SSDLITE_BACKBONE} only, got {name}. Use that backbone or another "
            "detector."
        )
    if set(backbone_args) - {"weights"}:
        raise ValueError(f"ssdlite takes only weights in backbone_args, got {', '.join(backbone_args)}.")
    network: nn.Module = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=backbone_args.get("weights"), num_classes=num_classes + 1, **args
    )
    return network


def _anchors(detector: Detector, levels: Sequence[Level], sizes: Sequence[Sequence[int]] | None) -> AnchorGenerator:
    """Return torchvision's anchors, sized by the strides."""
    strides = [level.stride for level in levels]
    coarser = 1 if detector in ("fasterrcnn", "maskrcnn") else 2  # maps added by the extra blocks
    strides += [strides[-1] * 2 ** (step + 1) for step in range(coarser)]
    if detector == "fcos":
        chosen = [[stride] for stride in strides]
    elif detector == "retinanet":
        chosen = [[int(4 * stride * 2 ** (third / 3)) for third in range(3)] for stride in strides]
    else:
        chosen = [[8 * stride] for stride in strides]
    if sizes is not None:
        if len(sizes) != len(chosen) or len({len(sides) for sides in sizes}) != 1:
            raise ValueError(
                f"anchor_sizes must be {len(chosen)} lists of equal length, one per map of the pyramid, for example "
                f"{chosen}; got {[list(sides) for sides in sizes]}."
            )
        chosen = [list(sides) for sides in sizes]
    ratios = (1.0,) if detector == "fcos" else (0.5, 1.0, 2.0)
    return AnchorGenerator(tuple(tuple(sides) for sides in chosen), (ratios,) * len(chosen))


def _check_arguments(detector: Detector, given: dict[str, Any]) -> None:
    accepted = [name for name in inspect.signature(_CLASSES[detector]).parameters if name not in _MADE_HERE]
    for name in given:
        if name not in accepted:
            raise ValueError(f"{detector} does not take {name!r}. It takes: {', '.join(accepted)}.")


def _refuse_unused(given: dict[str, Any], unused: Sequence[str], kind: str) -> None:
    defaults = inspect.signature(get_detector).parameters
    for name in unused:
        if given[name] != defaults[name].default:
            raise ValueError(f"{name} is not for {kind}, got {given[name]}. Omit it.")
