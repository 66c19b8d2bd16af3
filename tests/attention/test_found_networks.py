"""Attention in networks whose sites are found by running them: exact, trainable, and in the branch alone."""

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dia_lightning.attention import _places, attach, detach, find_sites
from dia_lightning.attention._attached_block import AttachedBlock
from tests.attention.found_networks import FOUND, OWN_SHORTCUT
from tests.attention.test_libraries import Constant

pytestmark = pytest.mark.filterwarnings("ignore:.*serve a single block")


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in evaluation mode, with norms and scales far from initialization, and its input."""
    make, shape = FOUND[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network, torch.randn(2, *shape, generator=generator)


def output(network: nn.Module, images: Tensor) -> Tensor:
    tensor: Tensor = tree_leaves(network(images))[0]
    return tensor


@pytest.mark.parametrize("name", FOUND)
def test_attention_is_exact_and_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_places, "find_sites", cache(find_sites))  # most of the time goes into searching it three times
    network, images = build(name)
    plain = copy.deepcopy(network).state_dict()
    with torch.no_grad():
        before = output(network, images)
        attach(network, "dia-lstm", example=images, identity=True)
        assert torch.equal(output(network, images), before)
        assert torch.equal(output(detach(network), images), before)
        attach(network, Constant, example=images, value=2.0, branch_norm=False)
        assert not torch.allclose(output(network, images), before)
    attach(detach(network), "dia-lstm", example=images, branch_norm=False)
    missing, unexpected = network.load_state_dict(plain, strict=False)
    units = {key: parameter for key, parameter in network.named_parameters() if key not in plain}
    assert set(missing) == set(units)
    assert all(".dia" in key for key in missing)
    assert unexpected == []
    result = output(network, images)
    torch.autograd.backward(result.square().mean())
    assert all(parameter.grad is not None for parameter in units.values())
    with torch.no_grad():
        others = torch.cat([images[:1], images[1:] + 1])
        torch.testing.assert_close(output(network, others)[:1], result[:1].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(FOUND) - set(OWN_SHORTCUT)))
def test_a_map_of_zero_leaves_the_shortcut_and_nothing_else(name: str) -> None:
    network, images = build(name)
    attach(network, Constant, example=images, value=0.0, branch_norm=False)
    passed: dict[str, bool] = {}

    def compare(block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        entry, left = (tree_leaves(value)[0] for value in (args, out))
        if entry.shape == left.shape:
            passed[paths[block]] = torch.equal(entry, left)

    paths: dict[nn.Module, str] = {
        module: path for path, module in network.named_modules() if isinstance(module, AttachedBlock)
    }
    for block in paths:
        block.register_forward_hook(compare)
    with torch.no_grad():
        output(network, images)
    assert passed
    assert all(passed.values()), [path for path, same in passed.items() if not same]
