"""Attached networks equal networks threaded by hand, and those of pytorchcv."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from dia_lightning.attention import attach
from dia_lightning.models import get_model

from .networks import (
    TinyNet,
    assert_equals_threaded,
    images,
    plain_keys,
    randomised,
    stages,
    threaded,
    unit_weights,
)

# Equality with networks threaded by hand


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_tiny_network_equals_one_threaded_by_hand(tiny: tuple[TinyNet, TinyNet], training: bool) -> None:
    plain, attached = tiny[0].train(training), tiny[1].train(training)
    assert_equals_threaded(plain, attached, images(4))


def test_the_state_makes_a_difference_in_the_tiny_network(tiny: tuple[TinyNet, TinyNet]) -> None:
    plain, attached = tiny
    units = unit_weights(attached)
    difference = threaded(plain, units, images()) - threaded(plain, units, images(), restart=True)
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_resnet18_equals_one_threaded_by_hand(resnet18_pair: tuple[nn.Module, nn.Module], training: bool) -> None:
    plain, attached = resnet18_pair[0].train(training), resnet18_pair[1].train(training)
    assert_equals_threaded(plain, attached, images(2, 64))


def test_resnet50_equals_one_threaded_by_hand(resnet50_pair: tuple[nn.Module, nn.Module]) -> None:
    assert_equals_threaded(*resnet50_pair, images(2, 64))


def test_running_statistics_move_as_in_the_network_threaded_by_hand(tiny: tuple[TinyNet, TinyNet]) -> None:
    plain, attached = tiny[0].train(), tiny[1].train()
    threaded(plain, unit_weights(attached), images(4))
    attached(images(4))
    moved = attached.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(moved[key], value, rtol=0, atol=1e-13)


PYTORCHCV_LAYERS = {
    "lstm.x_amps.amp1.fc1": "input_reduce",
    "lstm.x_amps.amp1.fc2": "input_expand",
    "lstm.h_amps.amp1.fc1": "hidden_reduce",
    "lstm.h_amps.amp1.fc2": "hidden_expand",
}


def load_from_pytorchcv(model: nn.Module, reference: nn.Module) -> None:
    """Copy weights in order of registration; the unit of a stage is registered in each of its blocks there."""
    theirs = reference.state_dict()
    backbone = [value for key, value in theirs.items() if ".attention." not in key]
    weights = dict(zip(plain_keys(model), backbone, strict=True))
    for number, (name, _) in enumerate(stages(model), start=1):
        for their_layer, layer in PYTORCHCV_LAYERS.items():
            for kind in ("weight", "bias"):
                key = f"features.stage{number}.unit1.attention.{their_layer}.{kind}"
                weights[f"{name}.0.dia.{layer}.{kind}"] = theirs[key]
    model.load_state_dict(weights)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("module", "their_name", "make_plain", "size"),
    [
        ("diaresnet_cifar", "diaresnet20_cifar10", lambda: get_model("cifar_resnet", depth=20, block="basic"), 32),
        ("diaresnet_cifar", "diaresnet164bn_cifar100", lambda: get_model("resnet164"), 32),
        ("diaresnet", "diaresnet18", lambda: resnet18(num_classes=100), 64),
        ("diaresnet", "diaresnet50b", lambda: resnet50(num_classes=100), 64),
    ],
    ids=["resnet20", "resnet164", "resnet18", "resnet50"],
)
def test_equals_pytorchcvs_network_under_mapped_weights(
    module: str, their_name: str, make_plain: Callable[[], nn.Module], size: int, training: bool
) -> None:
    networks = pytest.importorskip(f"pytorchcv.models.{module}")
    reference = randomised(getattr(networks, their_name)(num_classes=100)).train(training)
    reference.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs only takes images of one size
    attached = attach(make_plain(), "dia-lstm", reduction=4).train(training)
    load_from_pytorchcv(attached, reference)
    assert sum(p.numel() for p in attached.parameters()) == sum(p.numel() for p in reference.parameters())
    batch = images(4 if training else 2, size, dtype=torch.float32)
    expected = reference(batch)
    difference = (attached(batch) - expected).abs().max() / expected.abs().max()
    assert difference.item() <= 1e-5
