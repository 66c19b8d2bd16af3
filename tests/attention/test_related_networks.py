"""Attention in networks of other kinds: recurrent, spiking, white-box, with memory, for multispectral images."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn

from dia_lightning.attention import attach, attention_layers, check, detach, find_sites, watch_maps

from .networks import backward
from .related_networks import RELATED

#: Name -> patterns of the layers that end residual branches. The other branches do not end in a layer: those inside
#: ISTA and HMA's attention to the memory.
SITES: dict[str, list[str]] = {
    "predrnn": ["layers.*.cell"],
    "ccdepth": ["encoder.*.conv2", "blocks.*.mssa.merge"],
    "demosaicing": ["body.*.conv2"],
    "hma": ["blocks.*.attention.out", "blocks.*.mlp.2", "read_*.mlp.2"],
    "spiking": ["blocks.*.bn2"],
}

#: Networks whose blocks run once per time step.
TIMED = ("predrnn", "spiking")


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    make, example = RELATED[name]
    return make().eval(), example


def attention_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if ".dia." in name}


@pytest.mark.parametrize("name", RELATED)
def test_the_networks_train_and_repeat_themselves(name: str) -> None:
    network, example = build(name)
    output = network(*example)
    assert len(output) == 2
    assert output.isfinite().all()
    assert torch.equal(output, network(*example))
    backward(output.square().sum())
    assert [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("name", SITES)
def test_residual_branches_are_found_by_running(name: str) -> None:
    network, example = build(name)
    found = [site.path for stage in find_sites(network, example) for site in stage]
    named = [path for path, _ in network.named_modules() if any(fnmatchcase(path, each) for each in SITES[name])]
    assert sorted(found) == sorted(named)


@pytest.mark.parametrize("attention", ["dia-lstm", "se"])
@pytest.mark.parametrize("name", SITES)
def test_the_identity_start_changes_no_bit(name: str, attention: str) -> None:
    network, example = build(name)
    attached = attach(copy.deepcopy(network), attention, example=example, identity=True)
    assert torch.equal(attached(*example), network(*example))


@pytest.mark.parametrize("attention", ["dia-lstm", "se"])
@pytest.mark.parametrize("name", SITES)
def test_every_parameter_of_the_attention_gets_a_gradient(name: str, attention: str) -> None:
    network, example = build(name)
    attach(network, attention, example=example, reduction=1)  # else few units could all be off
    backward(network(*example).square().sum())
    units = attention_parameters(network)
    assert units
    assert [key for key, value in units.items() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("name", SITES)
def test_everything_holds(name: str) -> None:
    network, example = build(name)
    report = check(attach(network, "dia-lstm", example=example, reduction=2), example)
    assert report.ok, f"\n{report}"
    # HMA lets the images of a batch attend to each other, with or without our attention.
    expected = ["batch mates do not matter"] if name == "hma" else []
    assert [row.name for row in report.rows if "the plain network fails too" in row.note] == expected, str(report)


def test_images_of_a_batch_matter_to_hma_itself() -> None:
    network, (images,) = build("hma")
    assert not torch.allclose(network(images)[:1], network(images[:1]), rtol=1e-3)


@pytest.mark.parametrize("attention", ["dia-lstm", "se"])
def test_a_network_without_shortcuts_is_refused(attention: str) -> None:
    network, example = build("adasr")
    assert RELATED.keys() - SITES.keys() == {"adasr"}
    with pytest.raises(ValueError, match=r"SpectralNet has no residual branch.*It has no shortcut"):
        attach(network, attention, example=example)
    with pytest.raises(ValueError, match="No attention is attached"):
        detach(network)


def maps_by_hand(units: list[nn.Module], features: list[Tensor], restarts: int) -> list[Tensor]:
    """Return the maps of units called in turn, with a new state at regular intervals."""
    maps, state = [], None
    for number, seen in enumerate(features):
        attention_map, state = units[number % len(units)](seen, state if number % restarts else None)
        maps.append(attention_map)
    return maps


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("share", ["stage", "block"])
@pytest.mark.parametrize("name", TIMED)
def test_attention_starts_anew_at_every_time_step(name: str, share: str, grad: bool) -> None:
    network, example = build(name)
    attach(network, "dia-lstm", example=example, share=share, reduction=2)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in attention_parameters(network).values():
            parameter.copy_(torch.randn_like(parameter))
    layers, features, maps = attention_layers(network), list[Tensor](), list[Tensor]()
    for layer in layers:  # a hook on a site sees its output before the map
        network.get_submodule(layer.path).register_forward_hook(
            lambda module, args, output: features.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.set_grad_enabled(grad), watch_maps(network, lambda number, attention_map, _: maps.append(attention_map)):
        network(*example)

    assert len(features) > len(layers)
    units = [module for path, module in network.named_modules() if path.endswith(".dia")]
    expected = maps_by_hand(units, features, len(layers) if share == "stage" else 1)
    for found, by_hand in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, by_hand)
    carried_on = maps_by_hand(units, features, len(features))
    first = len(layers)  # of the second time step
    assert not torch.allclose(carried_on[first], expected[first], rtol=1e-2)
