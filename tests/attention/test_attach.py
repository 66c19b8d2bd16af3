"""attach and detach: equal to networks threaded by hand, and clean to save, load and take apart."""

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50, wide_resnet50_2
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import DIALSTM, SqueezeExcitation, attach, check, detach, list_attention
from dia_lightning.models import get_model

from .networks import (
    TinyNet,
    branch_and_shortcut,
    gradients,
    images,
    largest_difference,
    lstm_step,
    pair,
    randomised,
    stages,
    threaded,
    threaded_gradients,
    unit_weights,
)

every_unit = pytest.mark.parametrize("name", ["cbam", "dia-lstm", "eca", "se", "sge", "spa", "srm"])
MASK = "101|0|0110"
MASK_BITS = [1, 0, 1, 0, 0, 1, 1, 0]


def plain_keys(model: nn.Module) -> list[str]:
    own = re.compile(r"\.(dia|branch_norm|unit_norm)\.")
    return [key for key in model.state_dict() if not own.search(key)]


def snapshot(model: nn.Module) -> tuple[list[tuple[str, type]], list[str]]:
    """What a network is made of: the type of every module, and its keys."""
    return [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())


# Equality with networks threaded by hand


def assert_equals_threaded(
    plain: nn.Module, attached: nn.Module, batch: Tensor, mask: list[int] | None = None, share: str = "stage"
) -> None:
    units = unit_weights(attached, share)
    expected = threaded(plain, units, batch, mask)
    output = attached(batch)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    output.square().sum().backward()
    if share == "stage":
        assert (
            largest_difference(gradients(attached), threaded_gradients(plain, units, expected.square().sum())) <= 1e-12
        )


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
    reference.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs takes images of one size only
    attached = attach(make_plain(), "dia-lstm", reduction=4).train(training)
    load_from_pytorchcv(attached, reference)
    assert sum(p.numel() for p in attached.parameters()) == sum(p.numel() for p in reference.parameters())
    batch = images(4 if training else 2, size, dtype=torch.float32)
    expected = reference(batch)
    difference = (attached(batch) - expected).abs().max() / expected.abs().max()
    assert difference.item() <= 1e-5


# Sharing, masks, added norms


def test_one_block_per_stage_makes_sharing_per_block_the_same_as_per_stage() -> None:
    plain = randomised(TinyNet(blocks=(1, 1, 1)).double().eval())
    shared = randomised(attach(copy.deepcopy(plain), "dia-lstm"))
    own = attach(copy.deepcopy(plain), "dia-lstm", share="block")
    own.load_state_dict(shared.state_dict())
    assert torch.equal(shared(images()), own(images()))


def test_sharing_per_block_gives_every_block_a_unit_and_a_state_of_its_own() -> None:
    plain, attached = pair(TinyNet().double().eval(), share="block")
    assert sum(isinstance(module, DIALSTM) for module in attached.modules()) == 8
    assert_equals_threaded(plain, attached, images(), share="block")


@pytest.mark.parametrize(
    "plug", [MASK, MASK_BITS, tuple(map(bool, MASK_BITS)), "101 0 0110", "1, 0, 1, 0, 0, 1, 1, 0"], ids=str
)
def test_blocks_left_out_by_the_mask_hand_the_state_on_unchanged(plug: Any) -> None:
    plain, attached = pair(TinyNet().double().eval(), plug=plug)
    assert [name for name, _ in attached.named_modules() if name.endswith(".dia")] == ["stage1.0.dia", "stage3.1.dia"]
    assert_equals_threaded(plain, attached, images(), MASK_BITS)


def test_a_mask_leaves_units_out_of_the_blocks_that_do_not_share() -> None:
    plain, attached = pair(TinyNet().double().eval(), plug=MASK, share="block")
    units = [name for name, _ in attached.named_modules() if name.endswith(".dia")]
    assert units == ["stage1.0.dia", "stage1.2.dia", "stage3.1.dia", "stage3.2.dia"]
    assert_equals_threaded(plain, attached, images(), MASK_BITS, share="block")


def test_a_mask_of_ones_changes_nothing(tiny: tuple[TinyNet, TinyNet]) -> None:
    plain, attached = tiny
    masked = attach(copy.deepcopy(plain), "dia-lstm", plug=[1] * 8)
    masked.load_state_dict(attached.state_dict())
    assert torch.equal(masked(images()), attached(images()))


@pytest.mark.parametrize(
    ("plug", "message"),
    [
        ("111", r"plug has 3 entries, but the network has 8 blocks \(3\+1\+4\)"),
        ([], r"plug has 0 entries, but the network has 8 blocks"),
        ("1" * 9, "plug has 9 entries"),
        ("101|2|0110", "plug takes 0 and 1 .* got '2'"),
        ([1, 0, 1, 0, 0, 1, 1, 5], "plug takes 0 and 1 .* got 5"),
        ([[1, 0, 1], [0], [0, 1, 1, 0]], r"plug takes 0 and 1 .* got \[1, 0, 1\]"),
        ("000|0|0000", "plug leaves every block without attention"),
    ],
)
def test_a_mask_that_does_not_fit_is_an_error(plug: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(TinyNet(), "se", plug=plug)


def test_separators_of_a_mask_must_stand_between_the_stages() -> None:
    with pytest.raises(ValueError, match=r"3\+1\+4"):
        attach(TinyNet(), "se", plug="1011|0|110")


def test_preactivation_branches_get_a_norm_before_the_unit() -> None:
    plain: Any = randomised(get_model("cifar_preresnet", depth=14, block="basic", num_classes=5).double().eval())
    attached = randomised(attach(copy.deepcopy(plain), "dia-lstm"), seed=1)
    attached.load_state_dict(plain.state_dict(), strict=False)
    weights, units = attached.state_dict(), unit_weights(attached)
    features = plain.conv1(images(2, 16))
    for name in ("layer1", "layer2", "layer3"):
        state = None
        for index, block in enumerate(getattr(plain, name)):
            shortcut = features if block.downsample is None else block.downsample(features)
            branch = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(features))))))
            norm = {key: weights[f"{name}.{index}.conv2.branch_norm.{key}"] for key in ("running_mean", "running_var")}
            scale, shift = (weights[f"{name}.{index}.conv2.branch_norm.{key}"] for key in ("weight", "bias"))
            branch = F.batch_norm(branch, **norm, weight=scale, bias=shift)
            attention_map, state = lstm_step(units[name], branch, state)
            features = branch * attention_map + shortcut
    expected = plain.fc(F.relu(plain.bn1(features)).mean((2, 3)))
    torch.testing.assert_close(attached(images(2, 16)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 6),
        ({"branch_norm": False}, 0),
        ({"branch_norm": True}, 6),
        ({"identity": True}, 0),
        ({"plug": "11|00|01"}, 3),
    ],
    ids=str,
)
def test_branch_norms_go_to_plugged_blocks_unless_refused_or_at_the_identity(options: Any, expected: int) -> None:
    model = attach(get_model("cifar_preresnet", depth=14, block="basic"), "dia-lstm", **options)
    assert sum(name.endswith(".conv2.branch_norm") for name, _ in model.named_modules()) == expected


def test_identity_and_added_norms_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="identity=True and branch_norm=True contradict"):
        attach(get_model("cifar_wrn", depth=10, widen_factor=1), "dia-lstm", identity=True, branch_norm=True)


@pytest.mark.parametrize(
    ("name", "plain", "attached"),
    [
        ("resnet164", 1_727_284, 1_946_132),
        ("preresnet164", 1_726_388, 1_961_364),
        ("wrn52_4", 12_072_500, 12_298_516),
        ("resnext101_8x32", 32_138_244, 33_006_020),
    ],
)
def test_the_authors_networks_have_the_authors_sizes(name: str, plain: int, attached: int) -> None:
    with torch.device("meta"):
        model = get_model(name, num_classes=100)
        assert sum(parameter.numel() for parameter in model.parameters()) == plain
        attach(model, "dia-lstm", reduction=4)
    assert sum(parameter.numel() for parameter in model.parameters()) == attached


def test_three_cells_on_resnet164_have_the_size_of_the_papers_ablation() -> None:
    with torch.device("meta"):
        model = attach(get_model("resnet164", num_classes=100), "dia-lstm", cells=3)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_329_556


@pytest.mark.parametrize(
    ("name", "options", "zero"),
    [
        ("cifar_resnet", {"depth": 11}, False),
        ("cifar_preresnet", {"depth": 11}, False),
        ("cifar_wrn", {"depth": 10, "widen_factor": 1}, True),
        ("cifar_resnext", {"depth": 11, "cardinality": 2}, True),
    ],
)
def test_biases_of_the_unit_start_at_zero_where_the_authors_do(name: str, options: Any, zero: bool) -> None:
    model = attach(get_model(name, **options), "dia-lstm", cells=2)
    biases = [value for key, value in model.state_dict().items() if ".dia." in key and key.endswith("bias")]
    assert len(biases) == 3 * 6
    assert all((bias == 0).all().item() is zero for bias in biases)


# The identity start


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_unit
def test_the_identity_start_is_bit_equal_to_the_plain_network(name: str, training: bool) -> None:
    plain = randomised(TinyNet(widths=(16, 16, 32)).train(training))
    attached = attach(copy.deepcopy(plain), name, identity=True)
    batch = images(4, dtype=torch.float32)
    assert torch.equal(attached(batch), plain(batch))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("cifar_resnet", {"depth": 11}),
        ("cifar_preresnet", {"depth": 11}),
        ("cifar_wrn", {"depth": 10, "widen_factor": 1}),
        ("cifar_resnext", {"depth": 11, "cardinality": 2}),
    ],
)
def test_the_identity_start_is_bit_equal_in_every_family(family: str, options: Any) -> None:
    plain = randomised(get_model(family, num_classes=7, **options).eval())
    attached = attach(copy.deepcopy(plain), "dia-lstm", identity=True)
    assert torch.equal(attached(images(2, 16, dtype=torch.float32)), plain(images(2, 16, dtype=torch.float32)))


def test_the_identity_start_needs_a_unit_that_has_one() -> None:
    model = TinyNet()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"identity=True needs .* start_at_identity\(\).*Linear is none"):
        attach(model, lambda channels: nn.Linear(channels, channels), identity=True)
    assert snapshot(model) == before


# Saving and loading


@pytest.mark.parametrize("options", [{}, {"share": "block"}, {"plug": MASK}, {"identity": True}], ids=str)
@every_unit
def test_plain_weights_load_with_exactly_the_units_keys_missing(name: str, options: Any) -> None:
    plain = randomised(TinyNet())
    attached = attach(TinyNet(), name, **options)
    loaded = attached.load_state_dict(plain.state_dict(), strict=False)
    assert loaded.unexpected_keys == []
    own = [key for key in attached.state_dict() if key not in plain.state_dict()]
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # torch fills those of new norms in itself
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
    assert {"layer1.0.conv3.weight", "layer1.0.conv3.branch_norm.running_var", "layer1.0.dia.norm.weight"} <= set(keys)
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


# Errors


def test_attaching_twice_is_an_error(tiny: tuple[TinyNet, TinyNet]) -> None:
    expected = tiny[1](images())
    with pytest.raises(ValueError, match=r"attached to this network already. Call detach\(model\) first"):
        attach(tiny[1], "se")
    assert torch.equal(tiny[1](images()), expected)


def test_a_network_without_known_blocks_names_what_it_is_made_of() -> None:
    with pytest.raises(
        ValueError, match=r"No residual block is known in Sequential.*Known blocks:.*torchvision.models"
    ) as error:
        attach(nn.Sequential(nn.TransformerEncoderLayer(8, 2)), "se")
    assert "TransformerEncoderLayer" in str(error.value)


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ("se", {"share": "net"}, "share must be 'stage' or 'block', got 'net'"),
        ("sa", {}, "Unknown attention 'sa'"),
        (None, {}, "Unknown attention None"),
        ("se", {"reductoin": 4}, "'reductoin'"),
        ("se", {"reduction": 0}, "reduction must be a positive number, got 0"),
        ("se", {"channels": 3}, "channels"),
        (lambda channels: None, {}, "must return an nn.Module, got NoneType"),
        (lambda: nn.Identity(), {}, "too many positional arguments"),
        (3, {}, "3"),
        (SqueezeExcitation(8), {}, "SqueezeExcitation"),
    ],
    ids=[
        "share", "name", "none", "argument typo", "bad value", "channels", "builds nothing", "takes nothing", "number",
        "module instead of class",
    ],
)  # fmt: skip
def test_wrong_arguments_are_errors_that_leave_the_network_alone(attention: Any, options: Any, message: str) -> None:
    model = TinyNet()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, attention, **options)
    assert snapshot(model) == before


def test_a_unit_that_fails_in_a_late_stage_leaves_the_network_alone() -> None:
    def build(channels: int) -> nn.Module:
        if channels > 8:
            raise ValueError("too wide")
        return SqueezeExcitation(channels)

    model = TinyNet(widths=(8, 8, 12))
    before = snapshot(model)
    with pytest.raises(ValueError, match="too wide"):
        attach(model, build)
    assert snapshot(model) == before


class BlockWithDia(BasicBlock):  # type: ignore[misc]
    """A block of somebody who uses the name already."""

    dia = "taken"


def test_a_block_that_uses_the_units_name_is_refused_and_left_alone() -> None:
    model = nn.Sequential(BlockWithDia(8, 8), BlockWithDia(8, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match="BlockWithDia has an attribute 'dia' already"):
        attach(model, "se")
    assert snapshot(model) == before


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


def test_one_block_cannot_share_a_unit_among_widths() -> None:
    with pytest.raises(ValueError, match=r"different widths: 0\.inner \(16\), 0\.outer \(8\)"):
        attach(nn.Sequential(TokenBlock(8)), "se", sites=["*.inner", "*.outer"])


# What the unit inherits, and what trains


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["dia-lstm", "srm"])
def test_new_modules_take_dtype_and_mode_from_the_network(name: str, training: bool, dtype: torch.dtype) -> None:
    network = get_model("cifar_preresnet", depth=11)
    model = attach(network.to(dtype).train(training), name)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {dtype}
    assert {module.training for module in model.modules()} == {training}


def test_a_unit_on_a_frozen_network_is_trainable() -> None:
    model = attach(TinyNet().requires_grad_(False), "dia-lstm")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".dia." in name}
    model(images(dtype=torch.float32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"share": "block"}, {"identity": True}, {"plug": "110|1|1011"}], ids=str)
@every_unit
def test_every_parameter_gets_a_gradient(name: str, options: Any) -> None:
    model = attach(TinyNet(), name, **options).train()
    model(images(4, dtype=torch.float32)).square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("cells", [1, 3])
def test_every_parameter_of_a_one_block_stage_gets_a_gradient(cells: int) -> None:
    model = attach(TinyNet(blocks=(1, 1, 1)), "dia-lstm", cells=cells).train()
    model(images(4, dtype=torch.float32)).square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_blocks_keep_their_class_name_and_attributes(tiny: tuple[TinyNet, TinyNet]) -> None:
    plain, attached = tiny
    mine, theirs = type(attached.stage1[1]), type(plain.stage1[1])
    assert issubclass(mine, theirs)
    assert (mine.__name__, mine.__qualname__, mine.__module__) == (
        theirs.__name__,
        theirs.__qualname__,
        theirs.__module__,
    )
    assert attached.stage1[1].stride == plain.stage1[1].stride
    assert type(attached.stage1[0]) is type(attached.stage3[2])


# Norms inside a unit


@pytest.mark.parametrize("name", ["srm", "cbam"])
def test_blocks_that_share_a_unit_have_norms_of_their_own(name: str) -> None:
    model = attach(TinyNet(), name).train()
    model(images(8, dtype=torch.float32))
    norms = [model.stage1[0].dia.norm, *(model.stage1[k].bn2.unit_norm for k in (1, 2))]
    assert len({id(norm) for norm in norms}) == 3
    means = [norm.running_mean for norm in norms]
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1, 1]
    if name == "cbam":
        assert not torch.equal(means[0], means[1])
        assert not torch.equal(means[1], means[2])
    units = [module for module in model.stage1.modules() if type(module).__name__ in ("StyleRecalibration", "CBAM")]
    assert len(units) == 1


def test_norms_of_their_own_see_the_statistics_of_their_own_block() -> None:
    plain, attached = pair(TinyNet(blocks=(3, 1, 1)).double(), "srm")
    unit = copy.deepcopy(attached.stage1[0].dia)
    norms = [unit.norm, *(copy.deepcopy(attached.stage1[k].bn2.unit_norm) for k in (1, 2))]
    plain.train()
    attached.train()
    attached(images(4))
    features = plain.stem(images(4))
    for index, (block, norm) in enumerate(zip(plain.stage1, norms, strict=True)):
        branch, shortcut = branch_and_shortcut(block, features)
        style = torch.stack([branch.mean((2, 3)), (branch.flatten(2).var(2) + 1e-5).sqrt()], dim=2)
        value = (style * unit.weight).sum(2)
        expected = 0.9 * norm.running_mean + 0.1 * value.mean(0)
        seen = attached.stage1[0].dia.norm if index == 0 else attached.stage1[index].bn2.unit_norm
        torch.testing.assert_close(seen.running_mean, expected, rtol=0, atol=1e-12)
        attention_map = F.batch_norm(value, None, None, norm.weight, norm.bias, training=True).sigmoid()
        features = F.relu(branch * attention_map[:, :, None, None] + shortcut)


@pytest.mark.parametrize("name", ["srm", "cbam"])
def test_a_shared_norm_sees_every_block(name: str) -> None:
    model = attach(TinyNet(), name, share_norm=True).train()
    model(images(8, dtype=torch.float32))
    assert int(model.stage3[0].dia.norm.num_batches_tracked) == 4
    assert not any("unit_norm" in key for key in model.state_dict())


# The signature


def test_attach_offers_exactly_the_units_of_the_papers_by_name() -> None:
    assert {"dia-lstm", "se", "eca", "cbam", "sge", "srm", "spa"} <= set(list_attention())
    options = inspect.signature(attach).parameters
    assert [name for name, option in options.items() if option.kind is option.POSITIONAL_OR_KEYWORD] == [
        "model",
        "attention",
    ]


def test_errors_of_loading_name_weights_as_in_the_plain_network() -> None:
    attached = attach(TinyNet(), "se")
    weights = {**attached.state_dict(), "stage1.0.bn2.weight": torch.zeros(7)}
    with pytest.raises(RuntimeError, match=r"size mismatch for stage1\.0\.bn2\.weight"):
        attached.load_state_dict(weights)


def test_the_bias_of_a_users_own_unit_is_left_alone() -> None:
    class Open(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gate = nn.Linear(channels, channels)
            nn.init.constant_(self.gate.bias, 2.0)

        def forward(self, features: torch.Tensor, state: None) -> tuple[torch.Tensor, None]:
            return torch.sigmoid(self.gate(features.mean((2, 3))))[:, :, None, None], None

    network: Any = attach(get_model("cifar_wrn", depth=10, widen_factor=1), Open)
    assert (network.layer1[0].dia.gate.bias == 2).all()


def test_check_refuses_a_network_whose_output_is_not_finite() -> None:
    network: Any = attach(get_model("cifar_resnet", depth=11), "se")
    nn.init.constant_(network.fc.bias, float("nan"))
    with pytest.raises(ValueError, match="puts out NaN or infinity"):
        check(network, torch.randn(2, 3, 16, 16))


def test_check_says_what_does_not_hold() -> None:
    class Sticky(SqueezeExcitation):
        """Remembers the features of the forward before."""

        last: torch.Tensor | None = None

        def forward(self, features: torch.Tensor, state: None = None) -> tuple[torch.Tensor, None]:
            attention_map, _ = super().forward(features, state)
            if self.last is not None and self.last.shape == attention_map.shape:
                attention_map = attention_map * self.last
            self.last = attention_map.detach()
            return attention_map, None

    report = check(attach(get_model("cifar_resnet", depth=20), Sticky), torch.randn(2, 3, 16, 16))
    failed = {row.name for row in report.rows if not row.holds}
    assert "earlier forwards do not matter" in failed
    assert not report.ok
    assert "NO" in str(report)


def test_what_cannot_be_attached_to_is_named() -> None:
    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features.mean((2, 3), keepdim=True)

    with pytest.raises(ValueError, match=r"Gate\.forward must take \(features, state\) and return \(map, state\)"):
        attach(TinyNet(), Gate)
    with pytest.raises(ValueError, match=r"model must be an nn\.Module, got 'resnet18'"):
        attach("resnet18", "se")  # type: ignore[type-var]
    headed = attach(get_model("cifar_resnet", depth=11), "se", sites=["fc"])
    with pytest.raises(RuntimeError, match=r"shape \(2, 100\) have no positions to attend to: Linear"):
        headed(torch.randn(2, 3, 16, 16))


def test_sites_can_be_chosen_by_a_function() -> None:
    def is_second_norm(path: str, module: nn.Module) -> bool:
        return path.endswith("bn2") and isinstance(module, nn.BatchNorm2d)

    by_function = attach(TinyNet(), "se", sites=is_second_norm)
    assert list(by_function.state_dict()) == list(attach(TinyNet(), "se").state_dict())

    def never(path: str, module: nn.Module) -> bool:
        return False

    with pytest.raises(ValueError, match=r"'never' matches no module\. Modules that could be sites: stem"):
        attach(TinyNet(), "se", sites=never)
