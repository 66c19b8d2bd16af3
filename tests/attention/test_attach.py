"""attach(): sharing, masks, added norms, the identity start, errors."""

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import DIALSTM, AttentionUnit, SqueezeExcitation, attach, list_attention
from dia_lightning.models import get_model

from .networks import (
    TinyNet,
    assert_equals_threaded,
    branch_and_shortcut,
    images,
    lstm_step,
    pair,
    randomised,
    snapshot,
    unit_weights,
)

every_unit = pytest.mark.parametrize("name", ["cbam", "dia-lstm", "dsu", "eca", "se", "sge", "spa", "srm", "stac"])
MASK = "101|0|0110"
MASK_BITS = [1, 0, 1, 0, 0, 1, 1, 0]


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
            norm = {key: weights[f"{name}.{index}.branch_norm.{key}"] for key in ("running_mean", "running_var")}
            scale, shift = (weights[f"{name}.{index}.branch_norm.{key}"] for key in ("weight", "bias"))
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
    assert sum(name.endswith(".branch_norm") for name, _ in model.named_modules()) == expected


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
    with pytest.raises(ValueError, match=r"identity=True needs .* start_at_identity\(\).*Linear is not one"):
        attach(model, lambda channels: nn.Linear(channels, channels), identity=True)
    assert snapshot(model) == before


# Errors


def test_attaching_twice_is_an_error(tiny: tuple[TinyNet, TinyNet]) -> None:
    expected = tiny[1](images())
    with pytest.raises(ValueError, match=r"already attached to this network: .* Call detach\(model\) first"):
        attach(tiny[1], "se")
    assert torch.equal(tiny[1](images()), expected)


def test_a_network_without_known_blocks_asks_for_an_example() -> None:
    with pytest.raises(ValueError, match=r"No residual block is known in Sequential.*Give `example`.*0\.self_attn"):
        attach(nn.Sequential(nn.TransformerEncoderLayer(8, 2)), "se")


class NoStart(AttentionUnit):
    """A unit that does not state what makes its map constant."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, features: torch.Tensor, state: None = None) -> tuple[torch.Tensor, None]:
        return features, None


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ("se", {"share": "net"}, "share must be one of stage, block, got 'net'"),
        ("sa", {}, "Unknown attention 'sa'"),
        (None, {}, "attention is None: name what to attach"),
        ("se", {"reductoin": 4}, "'reductoin'"),
        ("se", {"reduction": 0}, "reduction must be a positive number, got 0"),
        ("se", {"channels": 3}, "channels"),
        (lambda channels: None, {}, "must return an nn.Module, got NoneType"),
        (lambda: nn.Identity(), {}, "too many positional arguments"),
        (3, {}, "3"),
        (SqueezeExcitation(8), {}, "SqueezeExcitation"),
        ("se", {"reduction": 2.5}, "reduction must be a whole number, got 2.5"),
        ("se", {"plug": True}, r"plug takes one boolean per block, or a string .* got True"),
        ("se", {"plug": "ean-typo"}, "got 'e' in 'ean-typo'"),
        ("se", {"branches": "attention"}, "branches takes a list of .* got 'attention'"),
        ("se", {"branches": ["mlp"]}, r"known residual blocks of TinyNet have branches of the kind 'conv' only"),
        ("se", {"sites": [nn.BatchNorm2d]}, "sites takes patterns of module paths"),
        (nn.Sigmoid, {}, "attention cannot be built for 8 channels"),
        (NoStart, {"identity": True}, r"identity=True needs NoStart\.output_parameters\(\)"),
    ],
    ids=[
        "share", "name", "none", "argument typo", "bad value", "channels", "builds nothing", "takes nothing", "number",
        "module instead of class", "fraction", "no mask", "unknown mask", "one branch", "other branches", "classes",
        "takes no channels", "no start",
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
    """A custom block that already uses the name."""

    dia = "taken"


def test_a_block_that_uses_the_units_name_is_refused_and_left_alone() -> None:
    model = nn.Sequential(BlockWithDia(8, 8), BlockWithDia(8, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match="BlockWithDia already has an attribute 'dia'"):
        attach(model, "se")
    assert snapshot(model) == before


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
    norms = [model.stage1[0].dia.norm, *(model.stage1[k].unit_norm for k in (1, 2))]
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
    norms = [unit.norm, *(copy.deepcopy(attached.stage1[k].unit_norm) for k in (1, 2))]
    plain.train()
    attached.train()
    attached(images(4))
    features = plain.stem(images(4))
    for index, (block, norm) in enumerate(zip(plain.stage1, norms, strict=True)):
        branch, shortcut = branch_and_shortcut(block, features)
        style = torch.stack([branch.mean((2, 3)), (branch.flatten(2).var(2) + 1e-5).sqrt()], dim=2)
        value = (style * unit.weight).sum(2)
        expected = 0.9 * norm.running_mean + 0.1 * value.mean(0)
        seen = attached.stage1[0].dia.norm if index == 0 else attached.stage1[index].unit_norm
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
    assert {"dia-lstm", "dsu", "se", "eca", "cbam", "sge", "srm", "spa", "stac"} <= set(list_attention())
    options = inspect.signature(attach).parameters
    assert [name for name, option in options.items() if option.kind is option.POSITIONAL_OR_KEYWORD] == [
        "model",
        "attention",
    ]


def test_the_bias_of_a_custom_unit_is_left_alone() -> None:
    class Open(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gate = nn.Linear(channels, channels)
            nn.init.constant_(self.gate.bias, 2.0)

        def forward(self, features: torch.Tensor, state: None) -> tuple[torch.Tensor, None]:
            return torch.sigmoid(self.gate(features.mean((2, 3))))[:, :, None, None], None

    network: Any = attach(get_model("cifar_wrn", depth=10, widen_factor=1), Open)
    assert (network.layer1[0].dia.gate.bias == 2).all()


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
    with pytest.raises(RuntimeError, match=r"'fc' of a CifarNetwork needs .* got a Tensor of shape \(2, 100\)"):
        headed(torch.randn(2, 3, 16, 16))
