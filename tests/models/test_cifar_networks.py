"""The CIFAR families: sizes, arithmetic of depths, initialisation, any image size, and independent references."""

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from pytorchcv.model_provider import get_model as pytorchcv_model
from pytorchcv.models.resnext_cifar import CIFARResNeXt
from pytorchcv.models.wrn_cifar import CIFARWRN
from torch import Tensor, nn

from dia_lightning.attention import attach
from dia_lightning.attention._site_table import BLOCK_RULES
from dia_lightning.models import cifar_preresnet, cifar_resnet, cifar_resnext, cifar_wrn, get_model
from dia_lightning.models.cifar_resnext import Bottleneck as ResNeXtBlock
from dia_lightning.models.cifar_wrn import BasicBlock as WideBlock

SMALL: dict[str, Callable[..., nn.Module]] = {
    "resnet bottleneck": lambda **options: cifar_resnet(depth=20, num_classes=5, **options),
    "resnet basic": lambda **options: cifar_resnet(depth=14, block="basic", num_classes=5, **options),
    "preresnet bottleneck": lambda **options: cifar_preresnet(depth=20, num_classes=5, **options),
    "preresnet basic": lambda **options: cifar_preresnet(depth=14, block="basic", num_classes=5, **options),
    "wrn": lambda **options: cifar_wrn(depth=16, widen_factor=2, num_classes=5, **options),
    "resnext": lambda **options: cifar_resnext(depth=20, cardinality=2, base_width=8, num_classes=5, **options),
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "plain", "with_dia"),
    [
        ("resnet164", 1_727_284, 1_946_132),
        ("preresnet164", 1_726_388, 1_961_364),
        ("wrn52_4", 12_072_500, 12_298_516),
        ("resnext101_8x32", 32_138_244, 33_006_020),
    ],
)
def test_parameters_of_the_papers_networks(name: str, plain: int, with_dia: int) -> None:
    with torch.device("meta"):
        network = get_model(name, num_classes=100)
        assert count(network) == plain
        assert count(attach(network, "dia-lstm", reduction=4)) == with_dia


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (cifar_resnet, {"depth": 100}, r"depth 9n\+2 with n >= 1, got depth=100\. .* 92 and 101"),
        (cifar_resnet, {"depth": 166, "block": "basic"}, r"depth 6n\+2 with n >= 1, got depth=166\. .* 164 and 170"),
        (cifar_resnet, {"depth": 50, "block": "bottleneck"}, r"got depth=50\. .* 47 and 56"),
        (cifar_preresnet, {"depth": 1}, r"got depth=1\. .* 11 and 20"),
        (cifar_wrn, {"depth": 28 + 1}, r"depth 6n\+4 with n >= 1, got depth=29\. .* 28 and 34"),
        (cifar_wrn, {"depth": 4}, r"got depth=4\. .* 10 and 16"),
        (cifar_resnext, {"depth": 50}, r"depth 9n\+2 with n >= 1, got depth=50\. .* 47 and 56"),
        (cifar_resnet, {"block": "Bottleneck"}, "block must be one of bottleneck, basic, got 'Bottleneck'"),
        (cifar_resnet, {"widen_factor": 0}, "widen_factor must be at least 1, got 0"),
        (cifar_resnext, {"cardinality": -1}, "cardinality must be at least 1, got -1"),
        (cifar_wrn, {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        (cifar_wrn, {"dropout": 1.5}, "between 0 and 1"),
    ],
)
def test_impossible_sizes_say_what_is_possible(
    build: Callable[..., nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 8), (3, 96), (4, 33)])
def test_any_image_size_and_number_of_channels_fits(name: str, channels: int, size: int) -> None:
    network = SMALL[name](in_channels=channels)
    assert network(torch.rand(2, channels, size, size)).shape == (2, 5)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    network = SMALL[name]()
    network(torch.randn(4, 3, 16, 16)).square().mean().backward()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.abs().max() > 0, path


@pytest.mark.parametrize("name", SMALL)
def test_widths_double_where_sizes_halve(name: str) -> None:
    network = SMALL[name]().eval()
    features = torch.rand(1, 3, 32, 32)
    features = network.get_submodule("conv1")(features)
    shapes = [tuple((features := network.get_submodule(f"layer{stage}")(features)).shape) for stage in (1, 2, 3)]
    width = shapes[0][1]
    assert shapes == [(1, width, 32, 32), (1, 2 * width, 16, 16), (1, 4 * width, 8, 8)]


def test_widen_factor_multiplies_the_stages() -> None:
    assert cifar_resnet(depth=11, widen_factor=3).get_parameter("fc.weight").shape == (100, 3 * 256)
    assert cifar_preresnet(depth=8, block="basic", widen_factor=2).get_parameter("fc.weight").shape == (100, 128)
    assert cifar_wrn(depth=10, widen_factor=10).get_parameter("fc.weight").shape == (100, 640)
    assert cifar_resnext(depth=11, widen_factor=2).get_parameter("fc.weight").shape == (100, 256)


def test_groups_of_resnext_double_with_the_stages() -> None:
    network = cifar_resnext(depth=11, cardinality=4, base_width=6, widen_factor=1)
    for stage, group_width in ((1, 6), (2, 12), (3, 24)):
        convolution = network.get_submodule(f"layer{stage}.0.conv2")
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.groups == 4
        assert convolution.weight.shape == (4 * group_width, group_width, 3, 3)


@pytest.mark.parametrize("name", SMALL)
def test_convolutions_and_norms_start_as_the_authors_have_them(name: str) -> None:
    torch.manual_seed(0)
    for path, module in SMALL[name](in_channels=3).named_modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            error = 4 / math.sqrt(2 * module.weight.numel())  # four standard errors of a standard deviation
            assert module.weight.std().item() == pytest.approx(expected, rel=error), path
            assert abs(module.weight.mean().item()) < 4 * expected / math.sqrt(module.weight.numel()), path
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), path
            assert torch.equal(module.bias, torch.zeros_like(module.bias)), path


@pytest.mark.parametrize(
    ("network", "gaussian", "zero_bias"),
    [
        (cifar_resnet(depth=11), False, False),
        (cifar_preresnet(depth=11), False, False),
        (cifar_wrn(depth=10, widen_factor=4), False, True),
        (cifar_resnext(depth=11), True, True),
    ],
    ids=["resnet", "preresnet", "wrn", "resnext"],
)
def test_classifier_starts_as_the_authors_have_it(network: nn.Module, gaussian: bool, zero_bias: bool) -> None:
    weight, bias = network.get_parameter("fc.weight"), network.get_parameter("fc.bias")
    bound = 1 / math.sqrt(weight.shape[1])  # of torch's default, which is uniform
    assert (weight.abs().max() > bound).item() is gaussian
    expected = math.sqrt(2 / weight.shape[1]) if gaussian else bound / math.sqrt(3)
    assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert (bias.abs().max() == 0).item() is zero_bias


def test_dropout_acts_in_training_only_and_only_when_asked_for() -> None:
    images = torch.rand(2, 3, 16, 16)
    network = cifar_wrn(depth=10, widen_factor=1, dropout=0.5)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))
    without = cifar_wrn(depth=10, widen_factor=1)
    assert torch.equal(without(images), without(images))
    assert {m.p for m in get_model("wrn52_4").modules() if isinstance(m, nn.Dropout)} == {0.3}


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copies a state dict with the same order of entries but other names."""
    keys, weights = list(target.state_dict()), list(source.state_dict().values())
    target.load_state_dict(dict(zip(keys, weights, strict=True)))


def randomize_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)


def project_raw_input(model: nn.Module) -> nn.Module:
    """Makes pytorchcv's pre-activation units project what the authors' blocks project."""

    def forward(unit: Any, features: Tensor) -> Tensor:
        branch, _ = unit.body(features)
        output: Tensor = branch + (unit.identity_conv(features) if unit.resize_identity else features)
        return output

    for module in model.modules():
        if hasattr(module, "resize_identity"):
            module.forward = MethodType(forward, module)
    return model


def test_blocks_of_each_family_have_a_rule_of_their_own() -> None:
    for name, block in (("cifar_resnext", ResNeXtBlock), ("cifar_wrn", WideBlock)):
        own, base = (f"{kind.__module__}.{kind.__qualname__}" for kind in (block, block.__base__ or block))
        assert own == f"dia_lightning.models.{name}.{block.__name__}"
        assert BLOCK_RULES[own] != BLOCK_RULES.get(base)


REFERENCES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "resnet20 basic": (
        lambda: cifar_resnet(depth=20, block="basic"),
        lambda: pytorchcv_model("resnet20_cifar100"),
    ),
    "resnet164": (
        lambda: get_model("resnet164"),
        lambda: pytorchcv_model("resnet164bn_cifar100"),
    ),
    "preresnet20 basic": (
        lambda: cifar_preresnet(depth=20, block="basic"),
        lambda: project_raw_input(pytorchcv_model("preresnet20_cifar100")),
    ),
    "preresnet164": (
        lambda: get_model("preresnet164"),
        lambda: project_raw_input(pytorchcv_model("preresnet164bn_cifar100")),
    ),
    "wrn22_4": (
        lambda: cifar_wrn(depth=22, widen_factor=4),
        lambda: CIFARWRN([[64] * 3, [128] * 3, [256] * 3], init_block_channels=16, num_classes=100),
    ),
    "resnext20_8x32": (
        lambda: cifar_resnext(depth=20),
        # its bottleneck_width counts channels of a group where the stage has 256 channels
        lambda: CIFARResNeXt(
            [[128] * 2, [256] * 2, [512] * 2], 32, cardinality=8, bottleneck_width=64, num_classes=100
        ),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_equal_those_of_pytorchcv(name: str) -> None:
    torch.manual_seed(0)
    network, reference = (build().double() for build in REFERENCES[name])
    randomize_norms(network)
    copy_in_order(network, reference)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for mode in (False, True):
        expected = reference.train(mode)(images)
        torch.testing.assert_close(network.train(mode)(images), expected, rtol=1e-10, atol=1e-10)
