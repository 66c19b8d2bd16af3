"""Attention maps as they are computed: complete, in order, and without changing anything."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dia_lightning.attention import attach, attention_layers, detach, watch_maps
from dia_lightning.models import get_model


def network(share: str = "stage", **options: object) -> nn.Module:
    torch.manual_seed(0)
    plain = get_model("cifar_resnet", depth=20, block="basic", num_classes=10)
    return attach(plain, "dia-lstm", share=share, **options).eval()  # type: ignore[arg-type]


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share", ["stage", "block"])
def test_stages_are_those_of_the_network_whatever_is_shared(share: str) -> None:
    layers = attention_layers(network(share))
    assert [layer.stage for layer in layers] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [layer.path for layer in layers[:4]] == ["layer1.0.bn2", "layer1.1.bn2", "layer1.2.bn2", "layer2.0.bn2"]


def test_blocks_without_attention_are_not_listed() -> None:
    layers = attention_layers(network(plug="101|001|111"))
    assert [layer.stage for layer in layers] == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("share", ["stage", "block"])
def test_what_is_seen_is_what_features_are_multiplied_by(share: str) -> None:
    watched = network(share)
    seen: dict[int, Tensor] = {}
    block: Any = watched.get_submodule("layer1.0")
    inside: list[Tensor] = []
    block.bn2.register_forward_hook(lambda *args: inside.append(args[2]))
    block.register_forward_hook(lambda _, args, output: inside.extend((args[0], output)))
    with watch_maps(watched, lambda layer, attention_map, _: seen.update({layer: attention_map})):
        watched(IMAGES)
    branch, shortcut, output = inside
    assert list(seen) == list(range(9))
    assert torch.equal((branch * seen[0] + shortcut).relu(), output)


def test_states_of_dia_lstm_are_handed_out_and_others_have_none() -> None:
    states = []
    watched = network()
    with watch_maps(watched, lambda _, attention_map, state: states.append((attention_map, state))):
        watched(IMAGES)
    attention_map, state = states[0]
    assert torch.equal(attention_map[:, :, 0, 0], state[-1][0])  # the hidden state is the map


def test_outputs_and_gradients_are_bit_equal() -> None:
    results = []
    for watched in (False, True):
        model = network().train()
        if watched:
            with watch_maps(model, lambda *_: None):
                output = model(IMAGES)
        else:
            output = model(IMAGES)
        output.square().sum().backward()
        results.append((output, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(one, other) for one, other in zip(results[0][1], results[1][1], strict=True))


def test_nothing_is_seen_after_the_context_even_if_it_ends_by_an_error() -> None:
    seen: list[int] = []
    model = network()
    with pytest.raises(KeyError), watch_maps(model, lambda layer, *_: seen.append(layer)):
        raise KeyError
    model(IMAGES)
    assert seen == []


def test_a_watched_network_is_not_watched_twice() -> None:
    model = network()
    with watch_maps(model, lambda *_: None):
        with pytest.raises(ValueError, match="already watched"), watch_maps(model, lambda *_: None):
            pass
        assert len(attention_layers(model)) == 9
    with watch_maps(model, lambda *_: None):
        pass


def test_a_plain_network_has_no_maps() -> None:
    with pytest.raises(ValueError, match="No attention is attached"):
        attention_layers(detach(network()))


def test_layers_keep_their_places_in_copies() -> None:
    model = network("block")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert attention_layers(other) == attention_layers(model)


@pytest.mark.parametrize("how", ["torch.compile(network)", "network.compile()", "block.compile()"])
def test_no_map_of_a_compiled_network_is_missed(how: str) -> None:
    model = attach(get_model("cifar_resnet", depth=8, block="basic", num_classes=10), "dia-lstm").eval()
    run = torch.compile(model, backend="eager") if how == "torch.compile(network)" else model
    for part in {"network.compile()": [""], "block.compile()": ["layer1.0", "layer3.0"]}.get(how, []):
        model.get_submodule(part).compile(backend="eager")
    seen: list[int] = []
    with torch.no_grad():
        expected = run(IMAGES)  # compiled now, without a watcher
        for _ in range(2):
            with watch_maps(model, lambda layer, *_: seen.append(layer)):
                assert torch.equal(run(IMAGES), expected)
            run(IMAGES)
    assert seen == [0, 1, 2, 0, 1, 2]
