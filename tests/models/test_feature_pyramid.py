"""Backbones with a feature pyramid, against those that torchvision builds."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18
from torchvision.models.detection.backbone_utils import _mobilenet_extractor, _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dia_lightning.models._feature_pyramid import PyramidBackbone, feature_body, freeze, freeze_norms


def pyramid(name: str | nn.Module, *, count: int = 4, width: int = 256, **args: Any) -> PyramidBackbone:
    body, levels = feature_body(name, args, count=count)
    return PyramidBackbone(body, levels, width, LastLevelMaxPool())


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def shake_norms(module: nn.Module) -> None:
    """Give norms statistics and weights that reveal whether they are used."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", range(6))
def test_the_layers_that_are_trained_are_those_of_torchvision(layers: int) -> None:
    ours = pyramid("torchvision/resnet18")
    freeze(ours.body, layers)
    assert trained(ours) == trained(_resnet_fpn_extractor(resnet18(), layers))


def test_the_blocks_of_one_resolution_of_a_mobile_network_are_one_layer() -> None:
    ours, _ = feature_body("torchvision/mobilenet_v3_small", {}, count=4)
    network = mobilenet_v3_small()
    for layers in (5, 4, 3, 2, 1, 0):
        freeze(ours, layers)
        # torchvision counts its last 1x1 convolution too, which a pyramid does not need
        theirs = _mobilenet_extractor(network, fpn=False, trainable_layers=layers + 1 if layers else 0)
        names = {name.removeprefix("0.") for name in trained(theirs) if name.startswith("0.")}
        assert trained(ours) == {name for name in names if not name.startswith("12.")}, layers


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("cifar_resnet", 3),
        ("torchvision/convnext_tiny", 4),
        ("torchvision/efficientnet_b0", 5),
        ("timm/resnet10t", 4),
        ("timm/convnext_atto", 4),
        ("timm/mobilenetv3_small_100", 6),
    ],
)
def test_every_network_is_trained_by_its_stages(name: str, stages: int) -> None:
    args = {"depth": 8, "block": "basic"} if name == "cifar_resnet" else {}
    body, _ = feature_body(name, args, count=4)
    counts = []
    for layers in reversed(range(stages + 2)):
        freeze(body, layers)
        counts.append(len(trained(body)))
    assert (counts[0], counts[-1]) == (len(dict(body.named_parameters())), 0)
    assert counts == sorted(set(counts), reverse=True)  # each layer holds something
    with pytest.raises(ValueError, match=rf"the stem and {stages} stages .*, got {stages + 2}"):
        freeze(body, stages + 2)


@pytest.mark.parametrize("layers", [-1, 6])
def test_more_layers_than_there_are_cannot_be_trained(layers: int) -> None:
    with pytest.raises(ValueError, match=rf"trainable_layers must be 0 \(all frozen\) to 5 .*, got {layers}"):
        freeze(pyramid("torchvision/resnet18").body, layers)


def test_frozen_norms_compute_what_those_of_torchvision_compute() -> None:
    torch.manual_seed(0)
    body, levels = feature_body("torchvision/resnet18", {}, count=4)
    shake_norms(body)
    freeze_norms(body)
    ours = PyramidBackbone(body, levels, 256, LastLevelMaxPool())
    theirs = _resnet_fpn_extractor(resnet18(norm_layer=FrozenBatchNorm2d), 5)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    before = {name: value.clone() for name, value in ours.named_buffers()}
    images = torch.rand(2, 3, 64, 64)
    found, expected = ours.train()(images), theirs.train()(images)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(value, before[name]) for name, value in ours.named_buffers())


@pytest.mark.parametrize(
    ("name", "args", "strides"),
    [
        ("cifar_resnet", {"depth": 8, "block": "basic", "stem_stride": 4}, [4, 8, 16]),
        ("cifar_resnext", {"depth": 11, "base_width": 4, "widen_factor": 1}, [1, 2, 4]),
        ("torchvision/resnet18", {}, [4, 8, 16, 32]),
        ("torchvision/convnext_tiny", {}, [4, 8, 16, 32]),
        ("torchvision/mobilenet_v3_small", {}, [4, 8, 16, 32]),
        ("torchvision/efficientnet_b0", {}, [4, 8, 16, 32]),
        ("timm/resnet10t", {}, [4, 8, 16, 32]),
        ("timm/convnext_atto", {}, [4, 8, 16, 32]),
    ],
)
@pytest.mark.parametrize("count", [3, 4])
def test_the_maps_have_the_stated_widths_and_strides(
    name: str, args: dict[str, Any], strides: list[int], count: int
) -> None:
    body, levels = feature_body(name, args, count=count)
    assert [level.stride for level in levels] == strides[-count:]
    backbone = PyramidBackbone(body, levels, 8, LastLevelMaxPool()).eval()
    with torch.no_grad():
        features = body(torch.rand(1, 3, 64, 128))
        maps = backbone(torch.rand(1, 3, 64, 128))
    features = list(features.values()) if isinstance(features, dict) else features
    sizes = [(1, level.channels, 64 // level.stride, 128 // level.stride) for level in levels]
    assert [tuple(feature.shape) for feature in features] == sizes
    assert list(maps) == [*map(str, range(len(levels))), "pool"]
    assert [tuple(maps[str(i)].shape) for i in range(len(levels))] == [(1, 8, *size[2:]) for size in sizes]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torchvision/vit_b_16", {}),
        ("torchvision/swin_t", {}),
        ("torchvision/vgg11", {}),
        ("torchvision/regnet_y_400mf", {}),
        ("cifar_wrn", {"depth": 10, "widen_factor": 1}),
        ("cifar_preresnet", {"depth": 11}),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), {}),
        (nn.Linear(3, 3), {}),
    ],
)
def test_a_network_without_stages_is_refused_with_those_that_can_be_taken(
    name: str | nn.Module, args: dict[str, Any]
) -> None:
    shown = name if isinstance(name, str) else type(name).__name__
    with pytest.raises(ValueError, match=rf"^{shown} has no stages .* Take a ResNet \(cifar_resnet, "):
        feature_body(name, args, count=4)


def test_networks_of_timm_without_a_pyramid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^timm/vit_tiny_patch16_224 has feature maps of strides \[16, 16, 16\]"):
        feature_body("timm/vit_tiny_patch16_224", {}, count=4)
    with pytest.raises(ValueError, match=r"^timm/swin_tiny_patch4_window7_224 has channels last"):
        feature_body("timm/swin_tiny_patch4_window7_224", {}, count=4)


def test_probing_a_network_leaves_it_as_it_was() -> None:
    network = resnet18().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    feature_body(network, {}, count=4)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
