"""Residual branches found by running hand-written networks."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.attention import attach, find_sites


def features(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, features: Tensor) -> Tensor:
        total: Tensor = features + self.branch(features)
        return total


def convolutions(channels: int = 8) -> nn.Sequential:
    layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def feed_forward(channels: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels))


def tower() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), *(Residual(convolutions()) for _ in range(2)))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tokens(number: int = 6) -> Tensor:
    return torch.randn(2, number, 16, generator=torch.Generator().manual_seed(0))


def paths(model: nn.Module, example: Any) -> list[list[str]]:
    return [[site.path for site in stage] for stage in find_sites(model, example)]


# Which blocks form a stage


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = tower(), tower()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        total: Tensor = self.left(left) * self.right(right)
        return total


def test_streams_that_run_one_after_the_other_share_nothing() -> None:
    model, example = Towers(), (images(), images())
    assert paths(model, example) == [[f"{name}.{i}.branch.2" for i in (1, 2)] for name in ("left", "right")]
    attach(model, "dia-lstm", example=example, reduction=1)
    model(*example).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("example", [(tokens(), tokens()), (tokens(), tokens(5))], ids=["equal", "different"])
def test_encoder_and_decoder_share_nothing_however_long_their_sequences_are(example: tuple[Tensor, Tensor]) -> None:
    model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
    assert list(map(len, find_sites(model, example))) == [4, 6]
    attach(model, "dia-lstm", example=example)
    model(*example).square().sum().backward()


class AddingLayer(nn.Module):
    """A layer that adds its input, as the output layers of some transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 16)

    def forward(self, hidden: Tensor, shortcut: Tensor) -> Tensor:
        total: Tensor = self.dense(hidden) + shortcut
        return total


class LayerOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.wide = nn.Linear(16, 32)
        self.out = AddingLayer()

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attention(states, states, states)[0]
        out: Tensor = self.out(F.gelu(self.wide(states)), states)
        return out


def test_a_branch_that_a_part_of_a_block_adds_belongs_to_the_block() -> None:
    model = nn.Sequential(*(LayerOfLayers() for _ in range(3)))
    (stage,) = find_sites(model, tokens())
    assert [(site.path, site.block, site.stream) for site in stage] == [
        (f"{i}.{path}", f"{i}", "states") for i in range(3) for path in ("attention", "out.dense")
    ]
    plain = model(tokens())
    assert torch.equal(attach(model, "dia-lstm", example=tokens(), identity=True)(tokens()), plain)


# What does not change


class Drawing(nn.Module):
    """A network that skips blocks at random, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList([Residual(convolutions()) for _ in range(8)])

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stem(images)
        for block in self.blocks:
            if random.random() < 0.5 or np.random.rand() < 0.1:
                features = block(features)
        return features + torch.rand(())


def generators() -> tuple[int, int, int]:
    states = random.getstate(), str(np.random.get_state()), tuple(torch.get_rng_state().tolist())
    return hash(states[0]), hash(states[1]), hash(states[2])


def test_a_network_that_draws_numbers_runs_twice_alike_and_leaves_the_generators_as_they_are() -> None:
    model = Drawing()
    random.seed(3)
    np.random.seed(3)
    before = generators()
    assert find_sites(model, images())
    assert generators() == before


# Which additions end a branch


class ParallelBranches(nn.Module):
    """Attention and parallel layers on the same normed features, as in GPT-J."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = feed_forward()

    def forward(self, states: Tensor) -> Tensor:
        normed = self.norm(states)
        total: Tensor = states + self.attention(normed, normed, normed)[0] + self.mlp(normed)
        return total


def test_both_of_two_branches_of_the_same_normed_features_are_found() -> None:
    model = nn.Sequential(ParallelBranches(), ParallelBranches())
    assert paths(model, tokens()) == [[f"{i}.{path}" for i in range(2) for path in ("attention", "mlp.2")]]


class CausalAttention(nn.Module):
    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = told
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = self.qkv(states).chunk(3, -1)
        if self.told:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            future = torch.full((states.shape[1],) * 2, -torch.inf, device=states.device).triu(1)
            mixed = (query @ key.mT + future).softmax(-1) @ value
        out: Tensor = self.out(mixed)
        return out


@pytest.mark.parametrize("told", [True, False], ids=["flag", "mask"])
def test_a_causal_network_is_refused_and_an_encoder_before_a_causal_decoder_is_not(told: bool) -> None:
    layers = [Residual(layer) for _ in range(2) for layer in (CausalAttention(told), feed_forward())]
    with pytest.raises(ValueError, match="in a causal network"):
        attach(nn.Sequential(*layers), "dia-lstm", example=tokens())
    model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    example = {"src": tokens(), "tgt": tokens(5), "tgt_mask": mask, "tgt_is_causal": True}
    assert list(map(len, find_sites(model, example))) == [4]


# What lies where


@pytest.mark.parametrize(("batch_first", "axis"), [(True, 0), (False, 1)])
def test_the_axis_of_the_samples_is_that_of_the_network(batch_first: bool, axis: int) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    network = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    example = features(2, 5, 16) if batch_first else features(5, 2, 16)
    assert {site.batch_axis for stage in find_sites(network, example) for site in stage} == {axis}
    alone = example.narrow(axis, 0, 1)
    attach(network, "dia-lstm", example=example, reduction=4)
    torch.testing.assert_close(network(example).narrow(axis, 0, 1), network(alone))


class TokenMixer(nn.Module):
    """A branch that mixes tokens, and one that mixes channels, as in MLP-Mixer."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(tokens, 7), nn.GELU(), nn.Linear(7, tokens), nn.Dropout(0.1))
        self.channels = nn.Sequential(nn.Linear(channels, 7), nn.GELU(), nn.Linear(7, channels))
        self.norm = nn.LayerNorm(channels)

    def forward(self, value: Tensor) -> Tensor:
        value = value + self.tokens(self.norm(value).transpose(-1, -2)).transpose(-1, -2)
        result: Tensor = value + self.channels(self.norm(value))
        return result


def test_channels_are_followed_where_tokens_are_mixed() -> None:
    (stage,) = find_sites(nn.Sequential(TokenMixer(5, 8), TokenMixer(5, 8)), features(2, 5, 8))
    assert [(site.path, site.channels, site.channel_axis) for site in stage] == [
        ("0.tokens.2", 8, 1),  # before dropout
        ("0.channels.2", 8, -1),
        ("1.tokens.2", 8, 1),
        ("1.channels.2", 8, -1),
    ]
    assert {(site.branch, site.stream, site.resolution) for site in stage} == {("mlp", "value", (5,))}


class Scaled(nn.Module):
    """A branch with a layer scale and an external gate, as in a DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, value: Tensor, gate: Tensor) -> Tensor:
        result: Tensor = value + gate * (self.scale * F.dropout(torch.relu(self.conv(value))))
        return result


def test_scales_dropout_and_activations_come_after_the_site() -> None:
    ((site,),) = find_sites(Scaled(), (features(2, 4, 6, 6), features(2, 4, 1, 1)))
    assert (site.path, site.block, site.stream, site.shape) == ("conv", "", "value", (2, 4, 6, 6))


class Arms(nn.Module):
    """Additions that do not end a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.down = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.position = nn.Parameter(torch.zeros(1, 4, 8, 8))

    def forward(self, value: Tensor) -> Tensor:
        value = value + self.position
        value = self.one(value) + self.three(value)  # as RepVGG in training
        value = value + self.norm(value)
        low = torch.relu(self.down(value))
        value = value + F.interpolate(low, scale_factor=2)  # as a feature pyramid
        left, right = value.chunk(2, 1)
        return torch.cat([left + torch.tanh(right), right], 1)


def test_other_additions_are_left_out_with_the_reason() -> None:
    stages = find_sites(Arms(), features(2, 4, 8, 8))
    assert stages == []
    reasons = [other.reason for other in stages.left_out]
    for reason in ("as deep as each other", "its branch is linear", "different resolutions", "slice of the channels"):
        assert sum(reason in each for each in reasons) == 1, reasons


# A layer shared by several blocks


def test_a_layer_shared_by_several_blocks_is_not_a_site() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    network = nn.Sequential(*(Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), shared)) for _ in range(3)))
    images = features(2, 4, 6, 6)
    (stage,) = find_sites(network, images)
    assert len({site.path for site in stage}) == 3
    plain = network(images)
    assert torch.equal(attach(network, "se", example=images, identity=True)(images), plain)


# The network does not change


def test_the_network_and_its_hooks_are_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), TwoConvolutions(), nn.Dropout(0.5)).train()
    seen: list[Tensor] = []
    network[0].register_forward_hook(lambda module, args, output: seen.append(output))
    before = {name: (tensor.clone(), tensor._version) for name, tensor in network.state_dict(keep_vars=True).items()}
    state, attributes = torch.get_rng_state(), [sorted(vars(module)) for module in network.modules()]
    find_sites(network, features(2, 3, 6, 6))
    assert seen == []
    assert torch.equal(torch.get_rng_state(), state)
    assert [sorted(vars(module)) for module in network.modules()] == attributes
    assert all(module.training for module in network.modules())
    for name, tensor in network.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name][0])
        assert tensor._version == before[name][1]


class TwoConvolutions(nn.Module):
    """A residual block whose forward reads values, which meta tensors lack, and writes into a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        if value.abs().max().item() > 1e6:
            raise ValueError("too large")
        result: Tensor = value + self.second(torch.relu(self.first(value)))
        return result


def test_a_latent_ends_a_stage() -> None:
    encoder, decoder = (nn.ModuleList(TwoConvolutions() for _ in range(2)) for _ in range(2))
    network = nn.Sequential(*encoder, nn.Conv2d(4, 1, 2, stride=2), nn.ConvTranspose2d(1, 4, 2, stride=2), *decoder)
    assert [len(stage) for stage in find_sites(network, features(2, 4, 8, 8))] == [2, 2]


# Mistakes


@pytest.mark.parametrize(
    ("make", "example", "message"),
    [
        (lambda: 3, features(2, 4, 6, 6), "model must be an nn.Module, got 3"),
        (lambda: TwoConvolutions(), features(2, 3, 6, 6), "TwoConvolutions does not run on the example"),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(4), convolutions(4)),
            features(2, 3, 6, 6),
            "does not run on the example",
        ),
        (lambda: nn.Sequential(nn.LayerNorm(4), feed_forward(4)), features(2, 6, 3), "does not run on the example"),
        (lambda: TwoConvolutions(), features(0, 4, 6, 6), "example has no samples"),
        (lambda: TwoConvolutions(), {"other": features(2, 4, 6, 6)}, "does not run on the example"),
        (lambda: TwoConvolutions(), None, "Give `example`"),
        (lambda: TwoConvolutions(), 3, "example has no tensor"),
        (
            lambda: attach(TwoConvolutions(), "se", sites="second"),
            features(2, 4, 6, 6),
            "already attached to this network",
        ),
        (lambda: torch.compile(TwoConvolutions()), features(2, 4, 6, 6), "already wrapped"),
    ],
)
def test_mistakes_raise_clear_errors(make: Any, example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_sites(make(), example)


@pytest.mark.parametrize(
    ("function", "found"), [(F.relu, 1), (F.leaky_relu, 1), (F.gelu, 0), (F.silu, 0), (torch.tanh, 0)]
)
def test_a_map_acts_behind_an_activation_or_has_the_same_effect(function: Any, found: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, value: Tensor) -> Tensor:
            result: Tensor = value + function(self.conv(torch.relu(value)))
            return result

    assert sum(map(len, find_sites(Block(), features(2, 4, 6, 6)))) == found
