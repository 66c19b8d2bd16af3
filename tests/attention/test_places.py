"""Which blocks get attention, and which of them form a stage."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import wide_resnet50_2
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import DIALSTM, attach, detach

from .networks import (
    TinyNet,
    branch_and_shortcut,
    images,
    lstm_step,
    randomised,
    snapshot,
    unit_weights,
)

# Which blocks form a stage


class Wrapper(nn.Module):
    """A network inside a task, as in a LightningModule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = nn.CrossEntropyLoss()

    def forward(self, batch: Tensor) -> Tensor:
        logits: Tensor = self.network(batch)
        return logits


def test_a_network_inside_a_task_gets_attention(tiny: tuple[TinyNet, TinyNet]) -> None:
    plain, attached = tiny
    task = attach(Wrapper(copy.deepcopy(plain)), "dia-lstm")
    task.load_state_dict({f"network.{key}": value for key, value in attached.state_dict().items()})
    assert torch.equal(task(images()), attached(images()))
    assert snapshot(detach(task).network) == snapshot(plain)


def test_two_networks_in_one_container_share_nothing(tiny: tuple[TinyNet, TinyNet]) -> None:
    plain, attached = tiny
    both = attach(nn.ModuleList([copy.deepcopy(plain), copy.deepcopy(plain)]), "dia-lstm")
    assert sum(isinstance(module, DIALSTM) for module in both.modules()) == 6
    both[0].load_state_dict(attached.state_dict())
    randomised(both[1], seed=7)
    alone = copy.deepcopy(both[1])
    expected = alone(images())
    assert torch.equal(both[0](images()), attached(images()))
    assert torch.equal(both[1](images()), expected)


def test_a_change_of_width_inside_one_container_starts_a_new_stage() -> None:
    narrow, wide = [BasicBlock(8, 8) for _ in range(2)], [BasicBlock(12, 12) for _ in range(2)]
    model = attach(nn.Sequential(*narrow, nn.Conv2d(8, 12, 1), *wide), "dia-lstm")
    assert [name for name, _ in model.named_modules() if name.endswith("dia")] == ["0.dia", "3.dia"]
    assert model(torch.randn(2, 8, 6, 6)).shape == (2, 12, 6, 6)


def test_a_single_block_is_a_network_too() -> None:
    block = randomised(BasicBlock(8, 8).eval())
    plain = copy.deepcopy(block)
    attach(block, "se")
    assert list(block.state_dict())[-1] == "dia.expand.bias"
    value = torch.randn(2, 8, 6, 6)
    branch, shortcut = branch_and_shortcut(plain, value)
    expected = F.relu(branch * block.dia(branch)[0] + shortcut)
    torch.testing.assert_close(block(value), expected)


def test_subclasses_of_known_blocks_are_known() -> None:
    model = attach(wide_resnet50_2(num_classes=3), "eca")
    assert sum(name.endswith(".dia") for name, _ in model.named_modules()) == 4

    class Own(BasicBlock):  # type: ignore[misc]
        """A block of the user."""

    own = attach(nn.Sequential(Own(8, 8), Own(8, 8)), "dia-lstm")
    assert isinstance(own[0], Own)
    assert own(torch.randn(2, 8, 6, 6)).shape == (2, 8, 6, 6)


class TwoBranches(nn.Module):
    """A block with two residual branches, as in a transformer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, value: Tensor) -> Tensor:
        value = value + self.first(value)
        result: Tensor = value + self.second(torch.tanh(value))
        return result


def two_branches_threaded(blocks: nn.Module, weights: dict[str, Tensor], value: Tensor) -> Tensor:
    state = None
    for block in blocks.children():
        assert isinstance(block, TwoBranches)
        branch = block.first(value)
        attention_map, state = lstm_step(weights, branch, state)
        value = value + branch * attention_map
        branch = block.second(torch.tanh(value))
        attention_map, state = lstm_step(weights, branch, state)
        value = value + branch * attention_map
    return value


@pytest.mark.parametrize("sites", [["*.first", "*.second"], "[01].*"], ids=str)
def test_a_block_with_two_named_branches_steps_twice(sites: Any) -> None:
    plain = randomised(nn.Sequential(TwoBranches(8), TwoBranches(8)).double())
    attached = randomised(attach(copy.deepcopy(plain), "dia-lstm", sites=sites), seed=1)
    attached.load_state_dict(plain.state_dict(), strict=False)
    weights = unit_weights(attached)[""]
    value = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(attached(value), two_branches_threaded(plain, weights, value), rtol=0, atol=1e-12)
    assert snapshot(detach(attached)) == snapshot(plain)


def test_every_named_branch_has_a_norm_of_its_own() -> None:
    model = attach(nn.Sequential(TwoBranches(8), TwoBranches(8)), "srm", sites=["*.first", "*.second"])
    assert sum(key.endswith("running_mean") for key in model.state_dict()) == 4


class TokenBlock(nn.Module):
    """A residual block on tokens [B, N, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, 2 * channels)
        self.outer = nn.Linear(2 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = tokens + self.outer(torch.tanh(self.inner(tokens)))
        return result


@pytest.mark.parametrize("shape", [(2, 9, 8), (2, 3, 3, 8)], ids=["tokens", "channels last"])
def test_named_linear_layers_have_their_channels_last(shape: tuple[int, ...]) -> None:
    plain: Any = randomised(nn.Sequential(TokenBlock(8), TokenBlock(8)).double())
    attached = randomised(attach(copy.deepcopy(plain), "dia-lstm", sites="*.outer"), seed=1)
    attached.load_state_dict(plain.state_dict(), strict=False)
    weights = unit_weights(attached)[""]
    tokens = expected = torch.randn(shape, dtype=torch.float64)
    state = None
    for block in plain:
        branch = block.outer(torch.tanh(block.inner(expected)))
        planes = branch.reshape(2, 9, 8).transpose(1, 2)[..., None]  # [B, C, N, 1]
        attention_map, state = lstm_step(weights, planes, state)
        expected = expected + branch * attention_map.reshape(2, *([1] * (len(shape) - 2)), 8)
    torch.testing.assert_close(attached(tokens), expected, rtol=0, atol=1e-12)


def test_named_sites_equal_those_of_the_table(tiny: tuple[TinyNet, TinyNet]) -> None:
    plain, attached = tiny
    named = attach(copy.deepcopy(plain), "dia-lstm", sites=["stage*.bn2"])
    named.load_state_dict(attached.state_dict())
    assert torch.equal(named(images()), attached(images()))


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("*.norm2", r"'\*.norm2' matches no module"),
        (["*.bn2", "*.typo"], r"'\*.typo' matches no module"),
        ("*.relu", "width of ReLU is unknown"),
        ([], "sites"),
    ],
)
def test_named_sites_that_do_not_fit_are_errors(sites: Any, message: str) -> None:
    model = TinyNet()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, "se", sites=sites)
    assert snapshot(model) == before


def test_branches_of_different_widths_in_a_block_share_with_those_of_other_blocks() -> None:
    plain = nn.Sequential(TokenBlock(8), TokenBlock(8))
    network = attach(copy.deepcopy(plain), "dia-lstm", sites=["*.inner", "*.outer"])
    units = {name: unit for name, unit in network.named_modules() if isinstance(unit, DIALSTM)}
    assert {name: unit.input_reduce.in_features for name, unit in units.items()} == {"0.dia": 16, "0.dia_2": 8}
    assert snapshot(detach(network)) == snapshot(plain)


def test_a_group_of_layers_of_different_widths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"different widths cannot share a unit: 0\.inner \(16\), 0\.outer \(8\)"):
        attach(nn.Sequential(TokenBlock(8)), "se", sites=[["*.inner", "*.outer"]])


def test_sites_can_be_chosen_by_a_function() -> None:
    def is_second_norm(path: str, module: nn.Module) -> bool:
        return path.endswith("bn2") and isinstance(module, nn.BatchNorm2d)

    by_function = attach(TinyNet(), "se", sites=is_second_norm)
    assert list(by_function.state_dict()) == list(attach(TinyNet(), "se").state_dict())

    def never(path: str, module: nn.Module) -> bool:
        return False

    with pytest.raises(ValueError, match=r"'never' matches no module\. Modules that could be sites: stem"):
        attach(TinyNet(), "se", sites=never)
