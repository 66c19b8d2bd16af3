"""Networks with a feature pyramid instead of a classifier: what torchvision's detectors call a backbone."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dia_lightning.models._build_on_meta import build_on_meta
from dia_lightning.models._cifar_network import CifarNetwork
from dia_lightning.models._registry import get_model

_PROBE_SIZE = 128  # pixels; large enough for the deepest stages of all networks

_TAKE = (
    "Take a ResNet (cifar_resnet, cifar_resnext, torchvision/resnet50, ...), a torchvision network with convolutional "
    "features such as torchvision/convnext_tiny, or such a timm network."
)


class Level(NamedTuple):
    """A feature map that a network returns."""

    channels: int
    stride: int


class PyramidBackbone(nn.Module):
    """A network's feature maps, brought to one width by a feature pyramid.

    The names of the weights are those of ``torchvision.models.detection.backbone_utils.BackboneWithFPN``, so that
    weights of torchvision's detectors fit.

    Args:
        body: returns its feature maps, from fine to coarse, as a list or by name.
        levels: the feature maps of the body.
        out_channels: width of the pyramid.
        extra_blocks: makes coarser maps from the last one.
    """

    def __init__(
        self, body: nn.Module, levels: Sequence[Level], out_channels: int, extra_blocks: ExtraFPNBlock
    ) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork([level.channels for level in levels], out_channels, extra_blocks)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images ``[B, 3, H, W]`` to feature maps ``[B, out_channels, H / stride, W / stride]`` by name."""
        features = self.body(images)
        if not isinstance(features, dict):
            features = OrderedDict((str(index), feature) for index, feature in enumerate(features))
        pyramid: dict[str, Tensor] = self.fpn(features)
        if torch.is_autocast_enabled(images.device.type):  # torchvision's anchors adopt the precision of the maps
            return {name: feature.float() for name, feature in pyramid.items()}
        return pyramid


def feature_body(backbone: str | nn.Module, args: dict[str, Any], count: int) -> tuple[nn.Module, list[Level]]:
    """Return a network that returns the last feature maps of a backbone, and a description of them.

    Args:
        backbone: a name that ``get_model`` knows, or a network with stages ``layer1``, ``layer2``, ... or ``features``.
        args: further arguments of a named backbone.
        count: maximum number of feature maps.

    Raises:
        ValueError: if the backbone has no feature maps of decreasing resolution.
    """
    if isinstance(backbone, str) and backbone.startswith("timm/"):
        return _timm_body(backbone, args, count)
    network = get_model(backbone, **args) if isinstance(backbone, str) else backbone
    stages = _stage_container(network)
    ends = [] if stages is None else _stage_ends(stages)[-count:]
    if stages is None or len(ends) < 2:
        name = backbone if isinstance(backbone, str) else type(backbone).__name__
        raise ValueError(f"{name} has no stages for a feature pyramid. {_TAKE}")
    body = IntermediateLayerGetter(stages, {name: str(index) for index, (name, _) in enumerate(ends)})
    return body, [level for _, level in ends]


def freeze(body: nn.Module, trainable_layers: int) -> None:
    """Freeze the weights of all but the last layers, counted as in torchvision: the stem and each stage are one.

    Raises:
        ValueError: if there are fewer layers.
    """
    layers = _layers(body)
    if not 0 <= trainable_layers <= len(layers):
        raise ValueError(
            f"trainable_layers must be 0 (all frozen) to {len(layers)} (the stem and {len(layers) - 1} stages of this "
            f"backbone), got {trainable_layers}."
        )
    for layer in layers[: len(layers) - trainable_layers]:
        for module in layer:
            module.requires_grad_(False)


def freeze_norms(body: nn.Module) -> None:
    """Replace batch norms with ones whose statistics and weights do not change.

    Raises:
        ValueError: if a norm does more than normalise in an unknown way.
    """
    for path, module in list(body.named_modules()):
        if type(module).__module__.startswith("timm."):
            _freeze_norm_of_timm(body, path, module)
        elif isinstance(module, nn.BatchNorm2d):
            if type(module) != nn.BatchNorm2d:  # noqa: E721  # one with attention equals it
                raise ValueError(f"frozen_norm=True does not know {type(module).__name__} ({path}). Set it to False.")
            frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
            state = {name: value for name, value in module.state_dict().items() if name != "num_batches_tracked"}
            frozen.load_state_dict(state)
            body.set_submodule(path, frozen)


def _freeze_norm_of_timm(body: nn.Module, path: str, module: nn.Module) -> None:
    if isinstance(module, nn.BatchNorm2d):  # timm's have an activation in them
        from timm.layers import freeze_batch_norm_2d

        body.set_submodule(path, freeze_batch_norm_2d(module))


def _timm_body(name: str, args: dict[str, Any], count: int) -> tuple[nn.Module, list[Level]]:
    try:
        chosen = build_on_meta(lambda: get_model(name, features_only=True, **{**args, "pretrained": False}))
        found = [Level(*pair) for pair in zip(_info(chosen).channels(), _info(chosen).reduction(), strict=True)]
    except RuntimeError as error:
        raise ValueError(f"{name} has no feature maps for a pyramid: {error}.") from error
    strides = [level.stride for level in found]
    if strides != sorted(set(strides)) or len(found) < 2:
        raise ValueError(f"{name} has feature maps of strides {strides}, but a feature pyramid needs increasing ones.")
    if getattr(chosen, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(f"{name} has channels last and a fixed image size, which no detector supports. {_TAKE}")
    indices = list(range(len(found)))[-count:]
    body = get_model(name, features_only=True, out_indices=indices, **args)
    return body, [found[index] for index in indices]


def _info(body: Any) -> Any:
    return body.feature_info


def _stage_container(network: nn.Module) -> nn.Module | None:
    """Return the module whose children, called in order, compute the features."""
    if isinstance(network, CifarNetwork) and network.preactivation:
        return None  # the norm that ends its last stage would be lost
    if hasattr(network, "layer1"):
        return network
    features = getattr(network, "features", None)
    return features if isinstance(features, nn.Sequential) and not hasattr(network, "permute") else None


def _stage_ends(stages: nn.Module) -> list[tuple[str, Level]]:
    """Return the last child at each resolution, with its feature map; the stem's own maps are left out."""
    was_training = stages.training
    stages.eval()
    ends: list[tuple[str, Level]] = []
    features = next(stages.parameters()).new_zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE)
    with torch.no_grad():
        for name, child in stages.named_children():
            if isinstance(child, nn.Linear | nn.AdaptiveAvgPool2d):
                break
            features = child(features)
            if features.ndim != 4:  # other libraries' pooling layers
                break
            level = Level(features.shape[1], _PROBE_SIZE // features.shape[2])
            if not _has_blocks(child):
                continue
            if ends and ends[-1][1].stride == level.stride:
                ends.pop()
            ends.append((name, level))
    stages.train(was_training)
    return ends


def _layers(body: nn.Module) -> list[list[nn.Module]]:
    """Return the stem and the stages, each as a list of modules."""
    children = dict(body.named_children())
    blocks = [name for name, child in children.items() if _has_blocks(child)]
    if len(blocks) == 1:  # one container of all stages, as in timm's networks of mobile blocks
        stages = children.pop(blocks[0])
        children |= {f"{blocks[0]}.{name}": child for name, child in stages.named_children()}
        blocks = [name for name in children if name.startswith(f"{blocks[0]}.")]
    is_probed = isinstance(body, IntermediateLayerGetter)
    ends = [name for name, _ in _stage_ends(body)] if is_probed else blocks
    layers: list[list[nn.Module]] = [[]]
    is_open = True
    for name, child in children.items():
        if name in blocks[:1] or not is_open:  # a downsampling layer belongs to the stage after it
            layers.append([])
        layers[-1].append(child)
        is_open = name not in ends[:-1]
    return layers


def _has_blocks(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.children())
