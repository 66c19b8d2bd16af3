"""Attached networks save, load and detach."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from dia_lightning.attention import attach, detach
from dia_lightning.models import get_model

from .networks import (
    TinyNet,
    images,
    pair,
    plain_keys,
    randomised,
    snapshot,
)

every_unit = pytest.mark.parametrize("name", ["cbam", "dia-lstm", "dsu", "eca", "se", "sge", "spa", "srm", "stac"])
MASK = "101|0|0110"


# Saving and loading


@pytest.mark.parametrize("options", [{}, {"share": "block"}, {"plug": MASK}, {"identity": True}], ids=str)
@every_unit
def test_plain_weights_load_with_exactly_the_units_keys_missing(name: str, options: Any) -> None:
    plain = randomised(TinyNet())
    attached = attach(TinyNet(), name, **options)
    loaded = attached.load_state_dict(plain.state_dict(), strict=False)
    assert loaded.unexpected_keys == []
    own = [key for key in attached.state_dict() if key not in plain.state_dict()]
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # torch itself fills in those of new norms
    assert set(loaded.missing_keys) | counters == set(own)
    assert own
    assert all(".dia." in key or ".unit_norm." in key for key in own)
    state = attached.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())


@every_unit
def test_keys_of_the_plain_network_stay_and_stay_in_order(name: str) -> None:
    plain = TinyNet()
    attached = attach(copy.deepcopy(plain), name)
    assert plain_keys(attached) == list(plain.state_dict())
    pointers = [value.data_ptr() for value in attached.state_dict().values() if value.ndim > 0]
    assert len(pointers) == len(set(pointers))


def test_keys_of_added_norms_stand_under_their_site() -> None:
    model = attach(get_model("cifar_preresnet", depth=11), "srm")
    keys = list(model.state_dict())
    assert {"layer1.0.conv3.weight", "layer1.0.branch_norm.running_var", "layer1.0.dia.norm.weight"} <= set(keys)
    assert not any("wrapped" in key for key in keys)


def test_the_unit_of_a_stage_stands_in_its_first_block(tiny: tuple[TinyNet, TinyNet]) -> None:
    own = {key.partition(".dia.")[0] for key in tiny[1].state_dict() if ".dia." in key}
    assert own == {"stage1.0", "stage2.0", "stage3.0"}


@pytest.mark.parametrize("assign", [False, True])
def test_an_attached_network_saves_and_loads(tiny: tuple[TinyNet, TinyNet], tmp_path: Path, assign: bool) -> None:
    attached = tiny[1]
    torch.save(attached.state_dict(), tmp_path / "weights.pt")
    other = attach(TinyNet().double().eval(), "dia-lstm")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    other.load_state_dict(weights, assign=assign)
    assert torch.equal(other(images()), attached(images()))
    assert sorted(weights) == sorted(attached.state_dict())  # loading leaves the caller's dict alone


@pytest.mark.parametrize("name", ["dia-lstm", "srm"])
def test_safetensors_saves_and_loads_an_attached_network(name: str, tmp_path: Path) -> None:
    _, attached = pair(TinyNet().double().eval(), name)
    save_file(attached.state_dict(), tmp_path / "dict.safetensors")
    save_model(attached, str(tmp_path / "model.safetensors"))
    assert load_file(tmp_path / "dict.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    other = attach(TinyNet().double().eval(), name)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(images()), attached(images()))


def test_errors_of_loading_name_keys_as_in_the_plain_network(tiny: tuple[TinyNet, TinyNet]) -> None:
    attached = tiny[1]
    weights = attached.state_dict()
    del weights["stage1.0.bn2.weight"]
    weights["stage1.1.bn2.extra"] = torch.zeros(1)
    loaded = attached.load_state_dict(weights, strict=False)
    assert loaded.missing_keys == ["stage1.0.bn2.weight"]
    assert loaded.unexpected_keys == ["stage1.1.bn2.extra"]


def test_a_missing_counter_of_a_norm_is_reported_as_in_the_plain_network(tiny: tuple[TinyNet, TinyNet]) -> None:
    for model in tiny:
        weights = model.state_dict()
        del weights["stage1.0.bn2.num_batches_tracked"]
        assert model.load_state_dict(weights, strict=False).missing_keys == ["stage1.0.bn2.num_batches_tracked"]


def test_a_checkpoint_of_an_attached_network_loads_into_the_plain_one_but_for_the_units(
    tiny: tuple[TinyNet, TinyNet],
) -> None:
    plain, attached = tiny
    loaded = plain.load_state_dict(attached.state_dict(), strict=False)
    assert loaded.missing_keys == []
    assert all(".dia." in key for key in loaded.unexpected_keys)


# Detaching


@pytest.mark.parametrize(
    "options", [{}, {"share": "block"}, {"plug": MASK}, {"identity": True}, {"attention": "srm"}], ids=str
)
def test_detaching_gives_the_plain_network_back(options: Any) -> None:
    plain = randomised(TinyNet().double().eval())
    model = copy.deepcopy(plain)
    attached = attach(
        model, options.get("attention", "dia-lstm"), **{k: v for k, v in options.items() if k != "attention"}
    )
    assert snapshot(model) != snapshot(plain)
    assert detach(attached) is model
    assert snapshot(model) == snapshot(plain)
    assert vars(model.stage1[1]).keys() == vars(plain.stage1[1]).keys()
    assert torch.equal(model(images()), plain(images()))


def test_detaching_takes_the_added_norms_out() -> None:
    plain = randomised(get_model("cifar_preresnet", depth=11).eval())
    model = detach(attach(copy.deepcopy(plain), "dia-lstm"))
    assert snapshot(model) == snapshot(plain)
    assert torch.equal(model(images(2, 16, dtype=torch.float32)), plain(images(2, 16, dtype=torch.float32)))


def test_attention_can_be_attached_again_after_detaching(tiny: tuple[TinyNet, TinyNet]) -> None:
    attached = tiny[1]
    again = attach(detach(copy.deepcopy(attached)), "dia-lstm")
    again.load_state_dict(attached.state_dict())
    assert torch.equal(again(images()), attached(images()))


def test_detaching_a_copy_leaves_the_original_attached(tiny: tuple[TinyNet, TinyNet]) -> None:
    plain, attached = tiny
    expected = attached(images())
    assert torch.equal(detach(copy.deepcopy(attached))(images()), plain(images()))
    assert torch.equal(attached(images()), expected)


def test_detaching_a_plain_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="No attention is attached"):
        detach(TinyNet())


def test_errors_of_loading_name_weights_as_in_the_plain_network() -> None:
    attached = attach(TinyNet(), "se")
    weights = {**attached.state_dict(), "stage1.0.bn2.weight": torch.zeros(7)}
    with pytest.raises(RuntimeError, match=r"size mismatch for stage1\.0\.bn2\.weight"):
        attached.load_state_dict(weights)
