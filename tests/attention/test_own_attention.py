"""Attention modules that networks come with: found, watched, replaced and shared."""

import copy
import io
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from dia_lightning.attention import DIALSTM, attach, attention_layers, check, detach, watch_maps
from dia_lightning.attention._own_attention import SharedModule

from .networks import backward, randomised


class Gate(nn.Module):
    """Squeeze-and-excitation as a user may write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        return features.mul(torch.sigmoid(self.layer(features.mean((2, 3))))[:, :, None, None])


class ChannelsThenPositions(nn.Module):
    """Two steps, as in CBAM."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = Gate(channels)
        self.positions = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        features = self.gate(features)
        result: Tensor = torch.sigmoid(self.positions(features)) * features
        return result


class Scaled(nn.Module):
    """Not attention: the factor does not depend on the features, or has no weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.scale * torch.rsqrt(features.square().mean(1, keepdim=True) + 1e-6)


class GatedBlock(nn.Module):
    def __init__(self, gate: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.gate = gate(8)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = features + self.last(self.gate(torch.relu(self.conv(features))))
        return result


def gated(gate: type[nn.Module], blocks: int = 3) -> Any:
    return randomised(nn.Sequential(*(GatedBlock(gate) for _ in range(blocks))).eval())


IMAGES = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))

# Which modules


@pytest.mark.parametrize(
    ("make", "kind", "stages"),
    [
        (lambda: timm.create_model("seresnet50", num_classes=3), "SEModule", [3, 4, 6, 3]),
        (lambda: timm.create_model("ecaresnet26t", num_classes=3), "EcaModule", [2, 2, 2, 2]),
        (lambda: timm.create_model("regnety_002", num_classes=3), "SEModule", [1, 1, 4, 7]),
        (lambda: timm.create_model("ese_vovnet19b_dw", num_classes=3), "EffectiveSEModule", [1, 1, 1, 1]),
        (lambda: torchvision.models.efficientnet_b0(), "SqueezeExcitation", [1, 1, 1, 1, 1, 1, 3, 2, 1, 4]),
        (lambda: torchvision.models.mobilenet_v3_large(), "SqueezeExcitation", [1, 2, 1, 1, 1, 2]),
    ],
)
def test_modules_of_libraries_are_found(make: Any, kind: str, stages: list[int]) -> None:
    network = make()
    layers = attention_layers(network)
    assert {type(network.get_submodule(layer.path)).__name__ for layer in layers} == {kind}
    assert [[layer.stage for layer in layers].count(stage) for stage in range(len(stages))] == stages


def test_steps_that_follow_one_another_are_one_module() -> None:
    layers = attention_layers(gated(ChannelsThenPositions), example=IMAGES)
    assert [layer.path for layer in layers] == ["0.gate", "1.gate", "2.gate"]
    assert [layer.block for layer in layers] == ["0", "1", "2"]


def test_norms_and_scales_are_not_attention() -> None:
    with pytest.raises(ValueError, match=r"no attention modules of its own"):
        attention_layers(gated(Scaled), example=IMAGES)


def test_a_network_that_is_not_known_needs_an_example() -> None:
    with pytest.raises(ValueError, match=r"No attention is attached.*Give `example`"):
        attention_layers(gated(Gate))


# Their maps


@pytest.mark.parametrize("gate", [Gate, ChannelsThenPositions])
def test_maps_are_what_features_are_multiplied_by(gate: type[nn.Module]) -> None:
    network = gated(gate)
    expected, seen, given = network(IMAGES), [], []
    for block in network:
        block.gate.register_forward_hook(lambda _, args, output: given.append((args[0], output)))
    with watch_maps(network, lambda layer, attention_map, state: seen.append(attention_map), example=IMAGES):
        assert torch.equal(network(IMAGES), expected)
    for attention_map, (features, output) in zip(seen, given, strict=True):
        torch.testing.assert_close(features * attention_map, output)
    assert all(type(module).__name__ != "WatchedModule" and "dia_watcher" not in vars(module) for module in network)


def test_a_network_is_watched_once_at_a_time_and_left_as_it_was() -> None:
    network = gated(Gate)
    kinds = [type(module) for module in network.modules()]
    twice = watch_maps(network, lambda *_: None, example=IMAGES)
    with (
        watch_maps(network, lambda *_: None, example=IMAGES),
        pytest.raises(ValueError, match="already watched"),
        twice,
    ):
        pass
    assert [type(module) is kind for module, kind in zip(network.modules(), kinds, strict=True)].count(False) == 0


# Replaced


def test_units_replace_modules_where_these_were() -> None:
    plain = gated(Gate)
    network = attach(copy.deepcopy(plain), "dia-lstm", existing="replace", example=IMAGES)
    unit = network[0].dia
    features, state = IMAGES, None
    for block in plain:
        inner = torch.relu(block.conv(features))
        attention_map, state = unit(inner, state)
        features = features + block.last(inner * attention_map)
    torch.testing.assert_close(network(IMAGES), features)
    assert sum(isinstance(module, DIALSTM) for module in network.modules()) == 1
    assert not any(isinstance(module, Gate) for module in network.modules())


@pytest.mark.parametrize("how", ["replace", "share"])
def test_detaching_gives_the_plain_network_back(how: Any) -> None:
    plain = gated(Gate)
    network = attach(copy.deepcopy(plain), "se" if how == "replace" else None, existing=how, example=IMAGES)
    copied = detach(copy.deepcopy(network))
    assert list(detach(network).state_dict()) == list(copied.state_dict()) == list(plain.state_dict())
    assert [str(module) for module in network] == [str(module) for module in plain]
    if how == "replace":
        assert torch.equal(network(IMAGES), plain(IMAGES))


def test_a_module_that_plug_leaves_out_stays() -> None:
    network = attach(gated(Gate), "se", existing="replace", plug="101", example=IMAGES)
    assert [isinstance(block.gate, Gate) for block in network] == [False, True, False]


# Shared


@pytest.mark.parametrize("start", ["mean", "first"])
def test_one_module_serves_all_blocks_of_a_stage(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = gated(Gate)
    with caplog.at_level("INFO", "dia_lightning"):
        network = attach(copy.deepcopy(plain), None, existing="share", existing_start=start, example=IMAGES)
    assert f"saves {2 * (8 * 8 + 8)} parameters" in caplog.text
    weights = torch.stack([block.gate.layer.weight for block in plain])
    shared = network[0].dia.module
    torch.testing.assert_close(shared.layer.weight, weights.mean(0) if start == "mean" else weights[0])
    features = IMAGES
    for block in plain:
        features = features + block.last(shared(torch.relu(block.conv(features))))
    torch.testing.assert_close(network(IMAGES), features)
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert count - sum(parameter.numel() for parameter in network.parameters()) == 2 * (8 * 8 + 8)


def test_what_a_shared_module_has_learnt_stays_after_detaching() -> None:
    network = attach(gated(Gate), None, existing="share", example=IMAGES)
    backward(network(IMAGES).square().sum())
    assert all(parameter.grad is not None for parameter in network.parameters())
    with torch.no_grad():
        for parameter in network[0].dia.parameters():
            parameter.add_(0.1)
    expected = network(IMAGES)
    torch.testing.assert_close(detach(network)(IMAGES), expected)
    assert network[0].gate.layer.weight is not network[1].gate.layer.weight


def test_modules_are_shared_beside_attention_that_is_attached() -> None:
    both = attach(gated(Gate), "dia-lstm", existing="share", identity=True, example=IMAGES)
    alone = attach(gated(Gate), None, existing="share", example=IMAGES)
    assert torch.equal(both(IMAGES), alone(IMAGES))
    assert [layer.path for layer in attention_layers(both)] == [
        *(f"{block}.last" for block in range(3)),
        *(f"{block}.gate" for block in range(3)),
    ]


def test_attention_at_the_end_of_a_branch_comes_after_a_shared_module_there() -> None:
    plain = timm.create_model("legacy_seresnet18", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    shared = attach(copy.deepcopy(plain), None, existing="share")
    both = attach(copy.deepcopy(plain), "se", existing="share", identity=True)
    assert torch.equal(both(images), shared(images))
    assert sum(isinstance(module, SharedModule) for module in both.modules()) == 4


def test_modules_whose_weights_have_other_shapes_are_not_shared() -> None:
    network = nn.Sequential(GatedBlock(Gate), GatedBlock(ChannelsThenPositions))
    with pytest.raises(ValueError, match="weights of the same shapes"):
        attach(network, None, existing="share", example=IMAGES)


def test_maps_of_a_shared_module_are_watched() -> None:
    network = attach(gated(Gate), None, existing="share", example=IMAGES)
    seen: list[Tensor] = []
    with watch_maps(network, lambda layer, attention_map, state: seen.append(attention_map)):
        network(IMAGES)
    assert [attention_map.shape for attention_map in seen] == [(2, 8, 1, 1)] * 3


@pytest.mark.parametrize(("attention", "how"), [("dia-lstm", "replace"), (None, "share"), ("se", "share")])
def test_every_check_holds(attention: str | None, how: Any) -> None:
    network = attach(gated(Gate), attention, existing=how, example=IMAGES)
    report = check(network, IMAGES)
    assert report.ok, f"\n{report}"


def test_weights_of_a_shared_module_are_saved_once() -> None:
    network = attach(gated(Gate), None, existing="share", example=IMAGES)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = attach(gated(Gate), None, existing="share", example=IMAGES)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [key for key in other.state_dict() if "gate" in key] == []
    assert torch.equal(other(IMAGES), network(IMAGES))


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ("se", {"existing": "drop"}, "existing must be one of keep, replace, share, got 'drop'"),
        (None, {}, "attention is None"),
        (None, {"existing": "replace"}, "attention is None"),
        (None, {"existing": "share", "existing_start": "last"}, "existing_start must be one of mean, first"),
        ("se", {"existing": "replace", "branches": ["conv"]}, "omit branches and sites"),
    ],
)
def test_options_that_do_not_fit_are_errors_that_leave_the_network_alone(
    attention: str | None, options: dict[str, Any], message: str
) -> None:
    network = gated(Gate)
    expected = network(IMAGES)
    with pytest.raises(ValueError, match=message):
        attach(network, attention, example=IMAGES, **options)
    assert torch.equal(network(IMAGES), expected)


# What other code does around it


class ScaleFirst(Gate):
    """Multiplies the other way round, as torchvision does."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.sigmoid(self.layer(features.mean((2, 3))))[:, :, None, None] * features


def test_the_map_of_a_single_position_is_not_taken_for_the_features() -> None:
    network, images = gated(ScaleFirst), IMAGES[:, :, :1, :1]
    seen: list[Tensor] = []
    with watch_maps(network, lambda layer, attention_map, state: seen.append(attention_map), example=IMAGES):
        network(images)
    given = torch.relu(network[0].conv(images))
    torch.testing.assert_close(seen[0] * given, network[0].gate(given))
    assert not torch.equal(seen[0], given)


class GateAndMap(Gate):
    def forward(self, features: Tensor) -> Any:
        scale = torch.sigmoid(self.layer(features.mean((2, 3))))[:, :, None, None]
        return features * scale, scale


def test_a_module_that_returns_more_than_features_is_left_alone() -> None:
    class Block(GatedBlock):
        def forward(self, features: Tensor) -> Tensor:
            result: Tensor = features + self.last(self.gate(self.conv(features))[0])
            return result

    with pytest.raises(ValueError, match=r"0\.gate' takes or returns more than features"):
        attach(nn.Sequential(Block(GateAndMap), Block(GateAndMap)), "se", existing="replace", example=IMAGES)


def test_a_module_already_shared_by_blocks_is_left_alone() -> None:
    network = gated(Gate)
    network[1].gate = network[2].gate = network[0].gate
    with pytest.raises(ValueError, match=r"0\.gate' is used by several blocks"):
        attach(network, "se", existing="replace", example=IMAGES)


@pytest.mark.parametrize("name", ["dia", "dia_2"])
def test_a_name_in_use_is_reported_before_anything_changes(name: str) -> None:
    network = gated(Gate)
    setattr(network[0], name, 3)
    with pytest.raises(ValueError, match=f"already has an attribute '{name}'"):
        attach(network, "se", existing="share", example=IMAGES)
    assert all(isinstance(block.gate, Gate) for block in network)
    assert not hasattr(network, "dia_chains")


def test_a_part_gives_its_attention_back_alone_only_if_it_can() -> None:
    network = attach(gated(Gate), None, existing="share", example=IMAGES)
    with pytest.raises(ValueError, match=r"Call detach\(\) on the whole"):
        detach(network[1])
    assert network(IMAGES).shape == IMAGES.shape
    other = attach(gated(Gate), "se", example=IMAGES)
    assert not hasattr(detach(other[1]), "dia_link")


def test_a_layer_that_replaced_a_module_stays() -> None:
    network = attach(gated(Gate), "se", existing="replace", example=IMAGES)
    network[1].gate = nn.ReLU()
    network(IMAGES)
    assert [type(block.gate).__name__ for block in detach(network)] == ["Gate", "ReLU", "Gate"]


def test_modules_of_different_settings_are_not_shared() -> None:
    network = gated(Gate)
    network[1].gate.threshold = 0.5
    with pytest.raises(ValueError, match="weights of the same shapes"):
        attach(network[:2], None, existing="share", example=IMAGES)


def test_a_copy_that_is_made_while_watching_is_not_watched() -> None:
    network, seen = gated(Gate), []
    with watch_maps(network, lambda *given: seen.append(given), example=IMAGES):
        copied = copy.deepcopy(network)
        copied(IMAGES)
        assert seen == []
        attention_layers(network, example=IMAGES)
        assert seen == []
