"""Gradients and changes of features in networks where they have a closed form."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dia_lightning.analysis import gradient_flow, relative_change
from dia_lightning.attention import attach
from dia_lightning.models import get_model

IMAGES = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


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
    flow = gradient_flow(network, IMAGES, lambda output: 7 * output.sum(), blocks=["1", "2", "3"])
    assert flow.blocks == ["1", "2", "3"]
    assert flow.mean.tolist() == pytest.approx([105, 35, 7])
    assert flow.quantiles.tolist() == [pytest.approx([105, 35, 7])] * 3


def test_quantiles_are_those_of_numpy_but_for_interpolation() -> None:
    flow = gradient_flow(chain(2.0), IMAGES, lambda output: output.square().sum() / 2, blocks=["1"])
    sizes = (2 * IMAGES).abs().numpy()
    assert flow.mean.item() == pytest.approx(sizes.mean())
    expected = np.quantile(sizes, [0.05, 0.5, 0.95], method="nearest")
    np.testing.assert_allclose(flow.quantiles[:, 0].numpy(), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_relative_change_of_a_multiple_is_its_factor_minus_1(in_place: bool) -> None:
    change = relative_change(chain(1.25, 0.5, in_place=in_place), IMAGES, blocks=["1", "2"])
    assert change.mean.tolist() == pytest.approx([0.25, 0.5])
    assert change.deviation.tolist() == pytest.approx([0, 0])


def test_the_relative_change_is_a_mean_over_images() -> None:
    class Shift(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features + torch.tensor([1.0, 2.0])[:, None, None, None]

    network = nn.Sequential(Shift()).eval()
    change = relative_change(network, torch.ones(2, 1, 2, 2), blocks=["0"])
    assert (change.mean.item(), change.deviation.item()) == pytest.approx((1.5, 0.5))


def test_blocks_with_attention_are_found_and_plain_ones_named() -> None:
    torch.manual_seed(0)
    plain = get_model("cifar_resnet", depth=14, block="basic", num_classes=10).eval()
    images = torch.randn(3, 3, 16, 16)
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    without = gradient_flow(plain, images, torch.sum, blocks=names)
    attach(plain, "dia-lstm", identity=True)  # computes the same
    with_attention = gradient_flow(plain, images, torch.sum)
    assert with_attention.blocks == without.blocks == names
    assert torch.allclose(with_attention.mean[-1], without.mean[-1], rtol=1e-4)
    assert relative_change(plain, images).mean.isnan().tolist() == [False, False, True, False, True, False]


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    network = attach(get_model("cifar_resnet", depth=14, block="basic", num_classes=10), "se").eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)  # frozen networks have gradients of features too
    images = torch.randn(2, 3, 16, 16)
    before = network(images)
    assert (gradient_flow(network, images, torch.sum).mean > 0).all()
    relative_change(network, images)
    assert torch.equal(network(images), before)
    assert not images.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_compiled_network_is_looked_at_uncompiled() -> None:
    network = chain(2.0, 3.0)
    network.compile(backend="eager")
    with torch.no_grad():
        network(IMAGES)  # compiled now, without a look at hooks that come later
    assert relative_change(network, IMAGES, blocks=["1", "2"]).mean.tolist() == pytest.approx([1, 2])
    assert gradient_flow(network, IMAGES, torch.sum, blocks=["1", "2"]).mean.tolist() == pytest.approx([3, 1])


def test_mistakes_are_said() -> None:
    with pytest.raises(ValueError, match="No attention is attached"):
        relative_change(chain(2.0), IMAGES)
    with pytest.raises(ValueError, match=r"in training mode.*Call network\.eval\(\)"):
        gradient_flow(chain(2.0).train(), IMAGES, torch.sum, blocks=["1"])
    network = chain(2.0)
    network[0].register_module("unused", nn.Identity())  # type: ignore[index]
    with pytest.raises(ValueError, match=r"The block 0\.unused did not run"):
        relative_change(network, IMAGES, blocks=["1", "0.unused"])
    with pytest.raises(ValueError, match="has no module '7'"):
        relative_change(network, IMAGES, blocks=["7"])
