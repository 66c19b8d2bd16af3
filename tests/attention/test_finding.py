"""Residual branches found by running networks that are written by hand."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.attention import attach, find_sites


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
    """A layer that adds what it is given, as the output layers of some transformers do."""

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


# What stays as it is


class Drawing(nn.Module):
    """A network that draws random numbers and skips blocks by them, also in evaluation mode."""

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
    """Attention and layers beside it, both of the same normed features, as in GPT-J."""

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
