"""Maps that are constant become weights; others, and those whose state is needed, stay."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dia_lightning.analysis import fold_constant_maps
from dia_lightning.attention import AttentionUnit, Stages, attach, attention_layers, watch_maps
from dia_lightning.attention._roles import Role
from dia_lightning.attention.inspection import attached_stages
from dia_lightning.models import get_model

IMAGES = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def network_with(attention: Any, name: str = "cifar_resnet", **options: Any) -> tuple[nn.Module, set[str]]:
    """A network of nine blocks with running statistics of data, and the keys of the plain one."""
    torch.manual_seed(0)
    plain = get_model(name, depth=29) if name == "cifar_preresnet" else get_model(name, depth=20, block="basic")
    keys = set(plain.state_dict())
    network = attach(plain, attention, **options)
    network.train()(torch.randn(8, 3, 16, 16))
    return network, keys


def make_constant(unit: nn.Module) -> None:
    """Let the maps of a unit depend on nothing but the biases of its last layer."""
    assert isinstance(unit, AttentionUnit)
    last = {id(parameter) for parameter in unit.output_parameters()}
    for name, parameter in unit.named_parameters():
        if id(parameter) in last:
            nn.init.normal_(parameter) if name.endswith("bias") else nn.init.zeros_(parameter)


@pytest.mark.parametrize(
    ("attention", "name", "added"),
    [
        ("dia-lstm", "cifar_resnet", []),
        ("cbam", "cifar_resnet", []),
        ("se", "cifar_preresnet", ["conv3.bias"] * 9),  # takes the place of the norm that attach put behind it
    ],
)
def test_constant_maps_leave_a_plain_network_of_the_same_outputs(attention: str, name: str, added: list[str]) -> None:
    network, keys = network_with(attention, name)
    for unit in [module for module in network.modules() if isinstance(module, AttentionUnit)]:
        make_constant(unit)
    for name, parameter in network.named_parameters():
        if "unit_norm" in name:  # which every block has of its own, in the place of the unit's
            nn.init.zeros_(parameter)
    with torch.no_grad():
        expected = [network.eval()(images) for images in IMAGES]
    report = fold_constant_maps(network.train(), IMAGES, 1e-6)
    assert len(report.folded) == len(report.sites) == 9
    assert max(site.variation for site in report.sites) < 1e-6
    assert report.difference < 1e-6 < report.magnitude
    assert not any(isinstance(module, Role) for module in network.modules())
    assert [key.split(".", 2)[2] for key in network.state_dict() if key not in keys] == added
    assert network.training
    for images, output in zip(IMAGES, expected, strict=True):
        torch.testing.assert_close(network.eval()(images), output, rtol=0, atol=1e-6)


class Remembering(AttentionUnit):
    """Hands on a state, as if the next block needed it."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, features: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        size = features.mean((2, 3), keepdim=True)
        return size.sigmoid(), size if state is None else state + size


def silence(network: nn.Module, blocks: list[list[int]]) -> None:
    """Let the features at some sites, and so their maps, be the same for all images."""
    for stage, numbers in enumerate(blocks, start=1):
        for number in numbers:
            norm: Any = network.get_submodule(f"layer{stage}.{number}.bn2")
            nn.init.zeros_(norm.weight)
            nn.init.normal_(norm.bias)


@pytest.mark.parametrize(
    ("attention", "folded"),
    [
        ("se", [[0, 1], [1, 2], [0, 2]]),
        (Remembering, [[], [1, 2], [2]]),  # behind the last one that varies
    ],
)
def test_maps_that_vary_or_whose_state_is_needed_stay(attention: Any, folded: list[list[int]]) -> None:
    options: dict[str, Any] = {"reduction": 2} if attention == "se" else {}
    network, keys = network_with(attention, **options)
    silence(network, [[0, 1], [1, 2], [0, 2]])
    with torch.no_grad():
        expected = network.eval()(IMAGES[0])
    report = fold_constant_maps(network, IMAGES, 1e-3)
    names = [f"layer{stage}.{number}.bn2" for stage, blocks in enumerate(folded, 1) for number in blocks]
    assert [site.path for site in report.folded] == names
    kept = {site.path: site.kept for site in report.sites if not site.is_folded}
    assert [layer.path for layer in attention_layers(network)] == list(kept)
    assert kept["layer1.2.bn2"] == "its map varies by more than 0.001"
    if attention is Remembering:
        assert kept["layer1.0.bn2"] == "later sites need the state that is made here"
    torch.testing.assert_close(network(IMAGES[0]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(network)(IMAGES[0]), expected, rtol=0, atol=1e-5)
    network.train()(IMAGES[0]).sum().backward()  # what is left still trains
    if attention == "se":
        assert set(network.state_dict()) - keys == {key for key in network.state_dict() if ".0.dia." in key}
        assert all(parameter.grad is not None for parameter in network.parameters())
        units = [sum(p.numel() for p in network.get_submodule(f"layer{n}.0.dia").parameters()) for n in (1, 2, 3)]
        assert attached_stages(network, Stages([], []))[1] == units


class WithActivation(nn.BatchNorm2d):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).relu()


def test_layers_that_do_not_take_a_factor_keep_their_attention() -> None:
    network, _ = network_with("se", share="block", identity=True)
    activated = WithActivation(16).eval()
    network.set_submodule("layer1.0.bn2", activated)
    shared: Any = network.get_submodule("layer1.1.bn2")
    shared.weight = network.get_submodule("layer1.2.bn2").weight
    network.set_submodule("layer2.0.bn2", nn.BatchNorm2d(32, affine=False))
    network.eval()(IMAGES[0])  # the layers that were put there later get their attention now
    weights = copy.deepcopy(network.state_dict())
    report = fold_constant_maps(network, IMAGES, 0)
    assert {site.path: site.kept for site in report.sites if site.kept} == {
        "layer1.0.bn2": "WithActivation does not scale with its weights",
        "layer1.1.bn2": "the weights of the BatchNorm2d are used elsewhere too",
        "layer1.2.bn2": "the weights of the BatchNorm2d are used elsewhere too",
        "layer2.0.bn2": "BatchNorm2d has no weights per channel",
    }
    for name, value in network.state_dict().items():  # of the identity start, and set back after they were tried
        torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=0)


def test_variation_is_the_largest_deviation_over_the_mean_of_the_map() -> None:
    network, _ = network_with("se", share="block", reduction=2)
    maps: list[Tensor] = []
    with watch_maps(network.eval(), lambda layer, values, _: maps.append(values) if layer == 4 else None):
        for images in IMAGES:
            network(images)
    values = torch.cat(maps).squeeze().double()  # [8, 32]
    report = fold_constant_maps(network, IMAGES, 0)
    expected = values.std(0, correction=0).max() / values.mean(0).mean()
    assert report.sites[4].variation == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, 1.0, math.inf])
def test_a_tolerance_that_is_no_share_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match=rf"tolerance must be in \[0, 1\), .* got {tolerance}"):
        fold_constant_maps(network_with("se")[0], IMAGES, tolerance)


def test_what_says_nothing_about_images_is_refused() -> None:
    network, _ = network_with("se")
    with pytest.raises(ValueError, match="at least two images"):
        fold_constant_maps(network, [IMAGES[0][:1]], 0.1)
    with pytest.raises(ValueError, match="batches is a list_iterator, which is exhausted after one pass"):
        fold_constant_maps(network, iter(IMAGES), 0.1)
    with pytest.raises(ValueError, match="No attention is attached"):
        fold_constant_maps(get_model("cifar_resnet", depth=11), IMAGES, 0.1)
