"""Gradients and changes of features in networks where they have a closed form."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dia_lightning.analysis import gradient_flow, relative_change, without_shortcuts
from dia_lightning.attention import attach
from dia_lightning.models import get_model

IMAGES = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def images() -> Tensor:
    """Return what a network may change in place."""
    return IMAGES.clone()


class Scale(nn.Module):
    """Multiplies by a number, perhaps in place."""

    def __init__(self, factor: float, *, in_place: bool = False) -> None:
        super().__init__()
        self.factor = factor
        self.in_place = in_place

    def forward(self, features: Tensor) -> Tensor:
        return features.mul_(self.factor) if self.in_place else features * self.factor


def chain(*factors: float, in_place: bool = False) -> nn.Module:
    first = nn.Identity() if not in_place else Scale(1.0)  # a leaf cannot be changed in place
    return nn.Sequential(first, *(Scale(factor, in_place=in_place) for factor in factors)).eval()


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_are_the_product_of_the_factors_behind_a_block(in_place: bool) -> None:
    network = chain(2.0, 3.0, 5.0, in_place=in_place)
    flow = gradient_flow(network, lambda: 7 * network(images()).sum(), blocks=["1", "2", "3"])
    assert flow.blocks == ["1", "2", "3"]
    assert flow.mean.tolist() == pytest.approx([105, 35, 7])
    assert flow.quantiles.tolist() == [pytest.approx([105, 35, 7])] * 3


def test_quantiles_are_those_of_numpy_but_for_interpolation() -> None:
    network = chain(2.0)
    flow = gradient_flow(network, lambda: network(images()).square().sum() / 2, blocks=["1"])
    sizes = (2 * IMAGES).abs().numpy()
    assert flow.mean.item() == pytest.approx(sizes.mean())
    expected = np.quantile(sizes, [0.05, 0.5, 0.95], method="nearest")
    np.testing.assert_allclose(flow.quantiles[:, 0].numpy(), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_relative_change_of_a_multiple_is_its_factor_minus_1(in_place: bool) -> None:
    network = chain(1.25, 0.5, in_place=in_place)
    change = relative_change(network, lambda: network(images()), blocks=["1", "2"])
    assert change.mean.tolist() == pytest.approx([0.25, 0.5])
    assert change.deviation.tolist() == pytest.approx([0, 0])


def test_the_relative_change_is_a_mean_over_images() -> None:
    class Shift(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features + torch.tensor([1.0, 2.0])[:, None, None, None]

    network = nn.Sequential(Shift()).eval()
    change = relative_change(network, lambda: network(torch.ones(2, 1, 2, 2)), blocks=["0"])
    assert (change.mean.item(), change.deviation.item()) == pytest.approx((1.5, 0.5))


def test_blocks_with_attention_are_found_and_plain_ones_named() -> None:
    torch.manual_seed(0)
    plain = get_model("cifar_resnet", depth=14, block="basic", num_classes=10).eval()
    seen = torch.randn(3, 3, 16, 16)
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    without = gradient_flow(plain, lambda: plain(seen).sum(), blocks=names)
    attach(plain, "dia-lstm", identity=True)  # computes the same
    with_attention = gradient_flow(plain, lambda: plain(seen).sum())
    assert with_attention.blocks == without.blocks == names
    assert torch.allclose(with_attention.mean[-1], without.mean[-1], rtol=1e-4)
    assert relative_change(plain, lambda: plain(seen)).mean.isnan().tolist() == [False, False, True, False, True, False]


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    network = attach(get_model("cifar_resnet", depth=14, block="basic", num_classes=10), "se").eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)  # frozen networks have gradients of features too
    seen = torch.randn(2, 3, 16, 16)
    before, state = network(seen), {name: value.clone() for name, value in network.state_dict().items()}
    assert (gradient_flow(network, lambda: network(seen).sum()).mean > 0).all()
    relative_change(network, lambda: network(seen))
    assert torch.equal(network(seen), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_compiled_network_is_looked_at_uncompiled() -> None:
    network = chain(2.0, 3.0)
    network.compile(backend="eager")
    with torch.no_grad():
        network(IMAGES)  # compiled now, without a look at hooks that come later
    change = relative_change(network, lambda: network(IMAGES), blocks=["1", "2"])
    assert change.mean.tolist() == pytest.approx([1, 2])
    flow = gradient_flow(network, lambda: network(IMAGES).sum(), blocks=["1", "2"])
    assert flow.mean.tolist() == pytest.approx([3, 1])


def resnet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = get_model("cifar_resnet", depth=20, block="basic", num_classes=10, **options)
    return attach(network, "dia-lstm").eval()


def test_gradients_are_those_of_autograd_also_where_all_weights_are_frozen() -> None:
    network, seen = resnet(), torch.randn(3, 3, 16, 16)
    outputs: dict[str, Tensor] = {}
    names = ["layer1.2", "layer3.0"]
    handles = [
        network.get_submodule(name).register_forward_hook(lambda *args, name=name: outputs.update({name: args[2]}))
        for name in names
    ]
    loss = network(seen).square().sum()
    wanted = torch.autograd.grad(loss, [outputs[name] for name in names])
    for handle in handles:
        handle.remove()
    for frozen in (False, True):
        network.requires_grad_(not frozen)
        flow = gradient_flow(network, lambda: network(seen).square().sum(), blocks=names)
        assert flow.mean.tolist() == pytest.approx([one.abs().mean().item() for one in wanted], rel=1e-5)


def test_without_shortcuts_gradients_are_those_of_a_network_built_without() -> None:
    network, bare, seen = resnet(), resnet(no_shortcut=[1, 2, 3]), torch.randn(3, 3, 16, 16)
    bare.load_state_dict({name: value for name, value in network.state_dict().items() if "downsample" not in name})
    before = network(seen)
    with without_shortcuts(network):
        torch.testing.assert_close(network(seen), bare(seen), rtol=0, atol=0)
        flow = gradient_flow(network, lambda: network(seen).square().sum())
    wanted = gradient_flow(bare, lambda: bare(seen).square().sum())
    assert torch.equal(flow.mean, wanted.mean)
    assert torch.equal(network(seen), before)
    assert not torch.equal(gradient_flow(network, lambda: network(seen).square().sum()).mean, wanted.mean)


def test_shortcuts_come_back_after_an_error_and_those_that_were_out_stay_out() -> None:
    network, seen = resnet(no_shortcut=[2]), torch.randn(1, 3, 16, 16)
    before = network(seen)
    with pytest.raises(RuntimeError, match="interrupted"), without_shortcuts(network):
        raise RuntimeError("interrupted")
    assert torch.equal(network(seen), before)
    with pytest.raises(ValueError, match="No block has a shortcut that can be disabled"), without_shortcuts(chain(1)):
        pass


def test_mistakes_raise_clear_errors() -> None:
    with pytest.raises(ValueError, match="No attention is attached"):
        relative_change(chain(2.0), lambda: None)
    network = chain(2.0)
    network[0].train()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"module 0 of the network is in training mode.*Call network\.eval\(\)"):
        gradient_flow(network, lambda: network(IMAGES).sum(), blocks=["1"])
    network.eval()
    network[0].register_module("unused", nn.Identity().eval())  # type: ignore[index]
    with pytest.raises(ValueError, match=r"The block 0\.unused did not run"):
        relative_change(network, lambda: network(IMAGES), blocks=["1", "0.unused"])
    with pytest.raises(ValueError, match="has no module '7'"):
        relative_change(network, lambda: network(IMAGES), blocks=["7"])
    network[1].register_forward_hook(lambda module, args, features: {"features": features})  # type: ignore[index]
    with pytest.raises(ValueError, match="output of the block 1 is a dict, not features"):
        relative_change(network, lambda: network[:2](IMAGES), blocks=["1"])  # type: ignore[index]
    network[1]._forward_hooks.clear()  # type: ignore[index]
    with pytest.raises(ValueError, match="loss must return a scalar"):
        gradient_flow(network, lambda: network(IMAGES), blocks=["1"])
    with pytest.raises(ValueError, match="loss must return a scalar"):
        gradient_flow(network, lambda: network(IMAGES).sum().detach(), blocks=["1"])
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="The loss does not depend on the output of the block 1"):
        gradient_flow(network, lambda: network(IMAGES).sum().detach() * weight, blocks=["1"])
