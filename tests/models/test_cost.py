"""The cost of attention, against known counts."""

import pytest
import torch
from torch import nn

from dia_lightning.models import get_model, network_cost


def test_parameters_of_the_arms_are_those_of_the_paper() -> None:
    costs = {
        cost.attention: cost
        for cost in network_cost(lambda: get_model("resnet164"), torch.empty(1, 3, 32, 32), repeats=0)
    }
    assert costs["none"].parameters == 1_727_284
    assert costs["dia-lstm"].parameters == 1_946_132
    # Per stage and unit: 2 * C * H + H + C with H = C / 16.
    units = [2 * width * (width // 16) + width // 16 + width for width in (64, 128, 256)]
    assert costs["se shared"].parameters == 1_727_284 + sum(units)
    assert costs["se per block"].parameters == 1_727_284 + 18 * sum(units)
    assert all(cost.latency is None for cost in costs.values())


def test_operations_of_a_known_network() -> None:
    def build() -> nn.Module:
        return get_model("cifar_resnet", depth=8, block="basic", num_classes=10)

    plain = network_cost(build, torch.empty(1, 3, 32, 32), repeats=0)[0]
    # Twice the multiplications: stem, then per stage two 3x3 convolutions, two 1x1 projections, and the classifier.
    stem = 32 * 32 * 9 * 3 * 16
    stages = 32 * 32 * 9 * 16 * 16 * 2 + 16 * 16 * 9 * (16 + 32) * 32 + 8 * 8 * 9 * (32 + 64) * 64
    projections = 16 * 16 * 16 * 32 + 8 * 8 * 32 * 64
    assert plain.flops == 2 * (stem + stages + projections + 64 * 10)


def test_latency_is_relative_to_the_plain_network() -> None:
    costs = network_cost(lambda: get_model("cifar_resnet", depth=11), torch.randn(2, 3, 16, 16), repeats=2)
    assert costs[0].latency == 1.0
    assert all(cost.latency is not None and cost.latency > 0 for cost in costs)


@pytest.mark.parametrize(
    ("shape", "repeats", "message"),
    [
        ((1, 3, 16, 16), -1, "repeats must be 0 or more, got -1"),
        ((3, 16, 16), 0, r"images must be \[B, C, H, W\] with at least one image, got \[3, 16, 16\]"),
        ((0, 3, 16, 16), 0, r"images must be .* got \[0, 3, 16, 16\]"),
    ],
)
def test_impossible_arguments_are_refused(shape: tuple[int, ...], repeats: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network_cost(lambda: get_model("cifar_resnet", depth=11), torch.empty(shape), repeats=repeats)


def test_a_network_without_residual_blocks_is_named() -> None:
    with pytest.raises(ValueError, match=r"AlexNet has no residual branch.*It has no shortcut"):
        network_cost(lambda: get_model("torchvision/alexnet"), torch.empty(1, 3, 224, 224), repeats=0)
