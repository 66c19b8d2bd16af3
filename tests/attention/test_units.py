"""Every attention module against its formula, and what all of them have in common."""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation as TorchvisionSE

from dia_lightning.attention import (
    CBAM,
    DIALSTM,
    AttentionCondenser,
    AttentionUnit,
    DynamicSharingUnit,
    EfficientChannelAttention,
    SpatialGroupEnhance,
    SpatialPyramidAttention,
    SqueezeExcitation,
    StyleRecalibration,
    attach,
    list_attention,
    register_attention,
)

from .networks import TinyNet, lstm_step, randomised

UNITS: dict[str, Callable[..., AttentionUnit]] = {
    "dia-lstm": DIALSTM,
    "dsu": DynamicSharingUnit,
    "se": SqueezeExcitation,
    "eca": EfficientChannelAttention,
    "cbam": CBAM,
    "sge": SpatialGroupEnhance,
    "srm": StyleRecalibration,
    "spa": SpatialPyramidAttention,
    "stac": AttentionCondenser,
}
every_unit = pytest.mark.parametrize("name", UNITS)


def features(batch: int = 3, channels: int = 16, size: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, channels, size, size + 1, dtype=dtype)


def make(name: str, channels: int = 16, **options: Any) -> Any:
    """Return a unit in float64 and eval mode whose parameters and statistics all matter."""
    if name == "sge":
        options.setdefault("groups", 4)
    return randomised(UNITS[name](channels, **options)).double().eval()


def assert_equal_with_gradients(found: Tensor, expected: Tensor, unit: nn.Module) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    weights, parameters = torch.randn_like(found), list(unit.parameters())
    gradients = torch.autograd.grad(found, parameters, weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters, weights), rtol=0, atol=1e-11)


# Formulas


def test_dia_lstm_equals_a_loop_written_by_hand() -> None:
    unit = make("dia-lstm", reduction=3)
    weights = {key: value.detach() for key, value in unit.named_parameters()}
    state = expected_state = None
    for _ in range(4):
        value = features()
        attention_map, state = unit(value, state)
        expected, expected_state = lstm_step(weights, value, expected_state)
        torch.testing.assert_close(attention_map, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_the_activation_turns_the_cell_state_into_the_hidden_state(activation: str) -> None:
    unit = make("dia-lstm", activation=activation)
    value = features()
    attention_map, ((hidden, cell),) = unit(value, unit(value, None)[1])
    _, ((before, _),) = unit(value, None)
    inner = F.relu(F.linear(before, unit.hidden_reduce.weight, unit.hidden_reduce.bias))
    gates = F.linear(inner, unit.hidden_expand.weight, unit.hidden_expand.bias)
    gates = gates + unit.input_expand(F.relu(unit.input_reduce(value.mean((2, 3)))))
    output_gate = gates[:, -16:].sigmoid()
    torch.testing.assert_close(hidden, output_gate * getattr(torch, activation)(cell), rtol=0, atol=1e-14)
    torch.testing.assert_close(attention_map[:, :, 0, 0], hidden, rtol=0, atol=0)


def test_stacked_cells_read_the_hidden_state_of_the_cell_below() -> None:
    unit = make("dia-lstm", cells=3)
    states: Any = [(torch.zeros(3, 16, dtype=torch.float64),) * 2] * 3
    state = None
    for _ in range(3):
        value = features()
        attention_map, state = unit(value, state)
        below = value.mean((2, 3))
        for index in range(3):
            hidden, cell = states[index]
            if index == 0:
                gates = unit.input_expand(F.relu(unit.input_reduce(below)))
                gates = gates + unit.hidden_expand(F.relu(unit.hidden_reduce(hidden)))
            else:
                layer = unit.upper[index - 1]
                gates = F.linear(below, layer.input.weight, layer.input.bias)
                gates = gates + F.linear(hidden, layer.hidden.weight, layer.hidden.bias)
            i, f, g, o = gates.split(16, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            below = o.sigmoid() * cell.sigmoid()
            states = [*states[:index], (below, cell), *states[index + 1 :]]
        torch.testing.assert_close(attention_map[:, :, 0, 0], below, rtol=0, atol=1e-14)


def test_dynamic_sharing_unit_equals_a_loop_written_by_hand() -> None:
    unit = make("dsu", reduction=3)
    weights = dict(unit.named_parameters())
    hidden = cell = torch.zeros(3, 16, dtype=torch.float64)
    state, found, expected = None, [], []
    for _ in range(4):
        value = features()
        attention_map, state = unit(value, state)
        found.append(attention_map)
        gates = torch.zeros(3, 48, dtype=torch.float64)
        for kind, given in (("input", value.mean((2, 3))), ("hidden", hidden)):
            inner = F.relu(given @ weights[f"{kind}_reduce.weight"].T + weights[f"{kind}_reduce.bias"])
            gates = gates + inner @ weights[f"{kind}_expand.weight"].T + weights[f"{kind}_expand.bias"]
        cell = gates[:, 16:32].sigmoid() * cell + gates[:, :16].sigmoid() * gates[:, 32:].tanh()
        hidden = cell.sigmoid()
        expected.append(hidden[:, :, None, None])
    assert_equal_with_gradients(torch.stack(found), torch.stack(expected), unit)
    torch.testing.assert_close(state, (hidden, cell), rtol=0, atol=1e-14)


def test_dynamic_sharing_unit_is_a_dia_lstm_whose_output_gate_is_open() -> None:
    unit, reference = make("dsu"), make("dia-lstm")
    opened = unit.state_dict()
    for name, fill in (("weight", 0.0), ("bias", 50.0)):
        for layer in ("input_expand", "hidden_expand"):
            gates = opened[f"{layer}.{name}"]
            opened[f"{layer}.{name}"] = torch.cat([gates, torch.full_like(gates[:16], fill)])
    reference.load_state_dict(opened)
    state = expected_state = None
    for _ in range(3):
        value = features()
        attention_map, state = unit(value, state)
        expected, expected_state = reference(value, expected_state)
        torch.testing.assert_close(attention_map, expected, rtol=0, atol=1e-14)


def test_squeeze_excitation_equals_torchvisions_under_mapped_weights() -> None:
    unit = make("se", reduction=4)
    reference = TorchvisionSE(16, 4).double()
    with torch.no_grad():
        for mine, theirs in ((unit.reduce, reference.fc1), (unit.expand, reference.fc2)):
            theirs.weight.copy_(mine.weight[:, :, None, None])
            theirs.bias.copy_(mine.bias)
    value = features()
    torch.testing.assert_close(value * unit(value)[0], reference(value), rtol=0, atol=1e-13)


def test_squeeze_excitation_equals_timms_under_mapped_weights() -> None:
    layers = pytest.importorskip("timm.layers")
    unit = make("se", reduction=4)
    reference = layers.SEModule(16, rd_channels=4).double()
    with torch.no_grad():
        for mine, theirs in ((unit.reduce, reference.fc1), (unit.expand, reference.fc2)):
            theirs.weight.copy_(mine.weight[:, :, None, None])
            theirs.bias.copy_(mine.bias)
    value = features()
    torch.testing.assert_close(value * unit(value)[0], reference(value), rtol=0, atol=1e-13)


@pytest.mark.parametrize("channels", [16, 64, 256, 512])
def test_efficient_channel_attention_equals_timms_under_mapped_weights(channels: int) -> None:
    layers = pytest.importorskip("timm.layers")
    unit = make("eca", channels)
    reference = layers.EcaModule(channels).double()
    reference.conv.weight.data.copy_(unit.conv.weight)
    value = features(channels=channels)
    torch.testing.assert_close(value * unit(value)[0], reference(value), rtol=0, atol=1e-13)


def test_efficient_channel_attention_slides_along_the_channels() -> None:
    unit = make("eca", kernel_size=5)
    value = features()
    padded = F.pad(value.mean((2, 3)), (2, 2))
    taps = unit.conv.weight[0, 0]
    expected = sum((taps[k] * padded[:, k : k + 16] for k in range(5)), torch.zeros(()))
    torch.testing.assert_close(unit(value)[0][:, :, 0, 0], expected.sigmoid(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("channels", "width"), [(16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (2048, 7)])
def test_efficient_channel_attention_widens_with_the_channels(channels: int, width: int) -> None:
    assert EfficientChannelAttention(channels).conv.kernel_size == (width,)


def test_cbam_equals_its_formula() -> None:
    unit = make("cbam", reduction=4, kernel_size=3)
    value = features()

    def mlp(pooled: Tensor) -> Tensor:
        inner = F.relu(F.linear(pooled, unit.reduce.weight, unit.reduce.bias))
        return F.linear(inner, unit.expand.weight, unit.expand.bias)

    channel = (
        mlp(F.adaptive_avg_pool2d(value, 1).flatten(1)) + mlp(F.adaptive_max_pool2d(value, 1).flatten(1))
    ).sigmoid()
    gated = value * channel[:, :, None, None]
    planes = torch.stack([gated.max(1).values, gated.mean(1)], dim=1)
    norm = unit.norm
    spatial = F.batch_norm(
        F.conv2d(planes, unit.conv.weight, padding=1), norm.running_mean, norm.running_var, norm.weight, norm.bias
    ).sigmoid()
    torch.testing.assert_close(unit(value)[0], channel[:, :, None, None] * spatial, rtol=0, atol=1e-13)


def test_spatial_group_enhance_equals_its_formula() -> None:
    unit = make("sge", groups=4)
    value = features()
    attention_map = unit(value)[0]
    for sample in range(3):
        for group in range(4):
            part = value[sample, 4 * group : 4 * group + 4]  # [4, H, W]
            similarity = (part * part.mean((1, 2))[:, None, None]).sum(0)
            similarity = (similarity - similarity.mean()) / (similarity.std() + 1e-5)
            gate = (unit.weight[group] * similarity + unit.bias[group]).sigmoid()
            expected = gate.expand(4, 7, 8)
            torch.testing.assert_close(attention_map[sample, 4 * group : 4 * group + 4], expected, rtol=0, atol=1e-13)


def test_style_recalibration_equals_its_formula() -> None:
    unit = make("srm")
    value = features()
    flat = value.flatten(2)
    style = torch.stack([flat.mean(2), (flat.var(2) + 1e-5).sqrt()], dim=2)
    norm = unit.norm
    expected = F.batch_norm(
        torch.einsum("bck,ck->bc", style, unit.weight), norm.running_mean, norm.running_var, norm.weight, norm.bias
    ).sigmoid()
    torch.testing.assert_close(unit(value)[0][:, :, 0, 0], expected, rtol=0, atol=1e-13)


def test_spatial_pyramid_attention_equals_its_formula() -> None:
    unit = make("spa", reduction=4)
    value = torch.randn(3, 16, 8, 12, dtype=torch.float64)
    parts = [value.reshape(3, 16, n, 8 // n, n, 12 // n).mean((3, 5)).reshape(3, -1) for n in (4, 2, 1)]
    inner = F.relu(F.linear(torch.cat(parts, dim=1), unit.reduce.weight, unit.reduce.bias))
    expected = F.linear(inner, unit.expand.weight, unit.expand.bias).sigmoid()
    torch.testing.assert_close(unit(value)[0][:, :, 0, 0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(8, 12), (7, 8), (5, 2), (1, 1), (20, 1)], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_attention_condenser_equals_its_formula(shape: tuple[int, int], size: int) -> None:
    unit = make("stac", reduction=4, size=size)
    value = torch.randn(3, 16, *shape, dtype=torch.float64)
    # A cell ends where the last position that it touches does, so cells overlap where they do not divide the axis.
    rows, columns = ([slice(k * n // size, -(-(k + 1) * n // size)) for k in range(size)] for n in shape)
    cells = torch.stack([value[:, :, row, column].mean((2, 3)) for row in rows for column in columns], dim=2)
    inner = F.relu(F.linear(cells.flatten(1), unit.reduce.weight, unit.reduce.bias))
    grid = F.linear(inner, unit.expand.weight, unit.expand.bias).sigmoid().reshape(3, 16, size, size)
    expected = torch.empty_like(value)
    for y in range(shape[0]):
        for x in range(shape[1]):
            expected[:, :, y, x] = grid[:, :, y * size // shape[0], x * size // shape[1]]
    assert_equal_with_gradients(unit(value)[0], expected, unit)


@pytest.mark.parametrize("shape", [(7, 8), (20, 1), (4, 6, 5)], ids=str)
def test_attention_condenser_of_one_cell_is_squeeze_excitation(shape: tuple[int, ...]) -> None:
    unit = make("stac", reduction=4, size=1, spatial_dims=len(shape))
    reference = make("se", reduction=4)
    reference.load_state_dict(unit.state_dict())
    value = torch.randn(3, 16, *shape, dtype=torch.float64)
    assert torch.equal(unit(value)[0], reference(value)[0])
    mean = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(unit(value, mean=mean)[0], reference(value, mean=mean)[0])


def test_attention_condenser_takes_a_mean_for_one_cell_only() -> None:
    assert [AttentionCondenser(8, size=size).takes_mean for size in (1, 2, 3)] == [True, False, False]


# Sizes and start values


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("channels", "reduction"), [(64, 4), (256, 20), (10, 4), (3, 8), (1, 1)])
def test_dia_lstm_has_the_parameters_of_the_authors_formula(channels: int, reduction: int) -> None:
    hidden = max(1, channels // reduction)
    expected = 2 * (channels * hidden + hidden + 4 * channels * hidden + 4 * channels)
    assert count(DIALSTM(channels, reduction)) == expected


@pytest.mark.parametrize(("channels", "reduction"), [(64, 4), (256, 16), (10, 4), (3, 8), (1, 1)])
def test_dynamic_sharing_unit_has_three_quarters_of_the_second_layers(channels: int, reduction: int) -> None:
    hidden = max(1, channels // reduction)
    expected = 2 * (channels * hidden + hidden + 3 * channels * hidden + 3 * channels)
    assert count(DynamicSharingUnit(channels, reduction)) == expected


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_both_layers_of_an_attention_condenser_see_every_cell(size: int, spatial_dims: Literal[2, 3]) -> None:
    width = 64 * size**spatial_dims
    unit = AttentionCondenser(64, size=size, spatial_dims=spatial_dims)
    assert count(unit) == 2 * width * 4 + 4 + width


def test_dia_lstm_with_one_cell_has_exactly_the_four_named_layers() -> None:
    shapes = {
        name: tuple(layer.weight.shape) for name, layer in DIALSTM(64, 4).named_modules() if hasattr(layer, "bias")
    }
    assert shapes == {
        "input_reduce": (16, 64),
        "input_expand": (256, 16),
        "hidden_reduce": (16, 64),
        "hidden_expand": (256, 16),
    }


def test_three_cells_give_the_authors_size_of_resnet164() -> None:
    units = sum(count(DIALSTM(channels, reduction=4, cells=3)) for channels in (64, 128, 256))
    assert 1_727_284 + units == 3_329_556


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("se", 2 * 64 * 4 + 4 + 64),
        ("eca", 3),
        ("cbam", 2 * 64 * 4 + 4 + 64 + 2 * 49 + 2),
        ("sge", 2 * 64),
        ("srm", 2 * 64 + 2 * 64),
        ("spa", 21 * 64 * 4 + 4 + 64 * 4 + 64),
        ("stac", 2 * 256 * 4 + 4 + 256),
    ],
)
def test_memoryless_units_have_the_parameters_of_their_formulas(name: str, expected: int) -> None:
    assert count(UNITS[name](64)) == expected


@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize(("name", "value"), [("dia-lstm", 0.25), ("dsu", 0.5)])
def test_maps_of_an_untrained_recurrent_unit_are_near_its_start_value(name: str, value: float, channels: int) -> None:
    unit = UNITS[name](channels)
    state = None
    for _ in range(18):
        attention_map, state = unit(torch.randn(8, channels, 4, 4), state)
        assert attention_map.mean().item() == pytest.approx(value, abs=0.02)
        assert attention_map.std().item() < 0.06


@every_unit
def test_maps_lie_between_zero_and_one(name: str) -> None:
    unit = make(name)
    attention_map = unit(features())[0]
    assert attention_map.min() > 0
    assert attention_map.max() < 1
    assert attention_map.std() > 1e-3  # it depends on its input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_unit
def test_identity_start_gives_maps_of_exactly_one(name: str, training: bool, dtype: torch.dtype) -> None:
    unit = UNITS[name](16).to(dtype).train(training)
    unit.start_at_identity()
    state = None
    for _ in range(3):
        attention_map, state = unit.to(dtype)(features(dtype=dtype), state)
        assert attention_map.dtype == dtype
        assert (attention_map == 1).all()


@pytest.mark.parametrize("cells", [1, 3])
def test_identity_start_of_stacked_cells_gives_maps_of_exactly_one(cells: int) -> None:
    unit = DIALSTM(16, cells=cells)
    unit.start_at_identity()
    _, state = unit(features(dtype=torch.float32))
    assert (unit(features(dtype=torch.float32), state)[0] == 1).all()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_identity_start_is_refused_where_the_map_starts_at_zero(activation: Any) -> None:
    unit = DIALSTM(16, activation=activation)
    with pytest.raises(ValueError, match=r"DIALSTM cannot start at the identity.*activation='sigmoid'"):
        unit.start_at_identity()


@every_unit
def test_every_parameter_of_an_identity_start_moves_within_three_steps_of_training(name: str) -> None:
    unit = UNITS[name](32).double()
    unit.start_at_identity()
    start = {key: value.detach().clone() for key, value in unit.named_parameters()}
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        state, loss = None, torch.zeros(())
        for _ in range(2):
            attention_map, state = unit(features(channels=32), state)
            loss = loss + (attention_map * torch.randn_like(attention_map)).sum() / 100
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert [key for key, value in unit.named_parameters() if torch.equal(value, start[key])] == []


def test_a_checkpoint_of_an_identity_start_does_not_fit_a_unit_without_one() -> None:
    unit = SqueezeExcitation(16)
    unit.start_at_identity()
    with pytest.raises(RuntimeError, match="scale"):
        SqueezeExcitation(16).load_state_dict(unit.state_dict())


# Inputs of every kind


@every_unit
def test_gradients_equal_finite_differences(name: str) -> None:
    unit = make(name, 4).train()
    value = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = list(unit.parameters())

    def two_steps(value: Tensor, *_: Tensor) -> Tensor:
        first, state = unit(value, None)
        second: Tensor = unit(value * 0.5 + first, state)[0]
        return second

    assert torch.autograd.gradcheck(two_steps, (value, *parameters))


@every_unit
def test_the_map_broadcasts_against_features_of_one_position(name: str) -> None:
    unit = make(name)
    value = torch.randn(2, 16, 1, 1, dtype=torch.float64, requires_grad=True)
    attention_map = unit(value)[0]
    (value * attention_map).sum().backward()
    assert value.grad is not None
    assert value.grad.isfinite().all()
    assert (value * attention_map).shape == value.shape


@every_unit
def test_constant_features_give_finite_gradients(name: str) -> None:
    unit = make(name).train()
    value = torch.zeros(2, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    unit(value)[0].sum().backward()
    assert value.grad is not None
    assert value.grad.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in unit.parameters())


@every_unit
def test_a_sample_alone_gets_the_map_it_gets_in_a_batch(name: str) -> None:
    unit = make(name)
    value = features()
    torch.testing.assert_close(unit(value[1:2])[0], unit(value)[0][1:2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in UNITS if name != "srm"])
def test_a_batch_of_one_can_be_trained_on(name: str) -> None:
    unit = make(name).train()
    unit(features(batch=1))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in unit.parameters())


def test_style_recalibration_refuses_to_normalise_a_batch_of_one() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make("srm").train()(features(batch=1))


@every_unit
def test_channels_last_features_stay_channels_last(name: str) -> None:
    unit = make(name)
    value = features().contiguous(memory_format=torch.channels_last)
    attention_map = unit(value)[0]
    assert (value * attention_map).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(attention_map, unit(value.contiguous())[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_unit
def test_maps_have_the_dtype_of_the_features_under_autocast(name: str, dtype: torch.dtype) -> None:
    unit = make(name).float()
    value = features(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, state = unit(value, None)
        second, _ = unit(value, state)
    assert first.dtype == second.dtype == dtype
    expected = unit(value.float(), unit(value.float(), None)[1])[0]
    torch.testing.assert_close(second.float(), expected, rtol=0, atol=2e-2)


@every_unit
def test_memoryless_units_take_and_return_none(name: str) -> None:
    state = make(name)(features())[1]
    assert (state is None) == (name not in ("dia-lstm", "dsu"))


def test_dropout_acts_between_stacked_cells_in_training_only() -> None:
    unit = make("dia-lstm", cells=2, dropout=0.5)
    value = features()
    torch.testing.assert_close(unit(value)[0], unit(value)[0], rtol=0, atol=0)
    unit.train()
    assert not torch.equal(unit(value)[0], unit(value)[0])


def test_dropout_does_nothing_in_a_single_cell() -> None:
    unit = make("dia-lstm", dropout=0.9)
    value = features()
    expected = unit(value, unit(value)[1])[0]
    unit.train()
    torch.testing.assert_close(unit(value, unit(value)[1])[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cbam", "srm"])
def test_a_norm_that_is_passed_takes_the_place_of_the_units_own(name: str) -> None:
    unit = make(name)
    norm = randomised(type(unit.norm)(unit.norm.num_features), seed=5).double().eval()
    value = features()
    mine, passed = unit(value, None)[0], unit(value, None, norm=norm)[0]
    assert not torch.allclose(mine, passed)
    unit.norm = norm
    torch.testing.assert_close(unit(value, None)[0], passed, rtol=0, atol=0)


# Errors and names


@pytest.mark.parametrize(
    ("make_unit", "message"),
    [
        (lambda: DIALSTM(0), "channels must be a positive number, got 0"),
        (lambda: DIALSTM(8, reduction=0), "reduction must be a positive number, got 0"),
        (lambda: DIALSTM(8, cells=0), "cells must be a positive number, got 0"),
        (lambda: DIALSTM(8, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: DIALSTM(8, dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
        (lambda: DIALSTM(8, activation="gelu"), "activation must be one of sigmoid, tanh, relu, got 'gelu'"),  # type: ignore[arg-type]
        (lambda: DynamicSharingUnit(0), "channels must be a positive number, got 0"),
        (lambda: DynamicSharingUnit(8, reduction=0), "reduction must be a positive number, got 0"),
        (lambda: SqueezeExcitation(-1), "channels must be a positive number, got -1"),
        (lambda: SqueezeExcitation(8, reduction=-2), "reduction must be a positive number, got -2"),
        (lambda: EfficientChannelAttention(0), "channels must be a positive number, got 0"),
        (lambda: EfficientChannelAttention(8, kernel_size=4), "kernel_size must be a positive odd number, got 4"),
        (lambda: EfficientChannelAttention(8, kernel_size=-3), "kernel_size must be a positive odd number, got -3"),
        (lambda: CBAM(8, kernel_size=2), "kernel_size must be a positive odd number, got 2"),
        (lambda: CBAM(8, reduction=0), "reduction must be a positive number, got 0"),
        (lambda: SpatialGroupEnhance(9, groups=4), r"groups must divide the number of channels \(9\), got 4"),
        (lambda: SpatialGroupEnhance(9, groups=0), "got 0"),
        (lambda: StyleRecalibration(0), "channels must be a positive number, got 0"),
        (lambda: SpatialPyramidAttention(8, reduction=0), "reduction must be a positive number, got 0"),
        (lambda: AttentionCondenser(8, reduction=0), "reduction must be a positive number, got 0"),
        (lambda: AttentionCondenser(8, size=0), "size must be a positive whole number, got 0"),
        (lambda: AttentionCondenser(8, size=2.0), "size must be a positive whole number, got 2.0"),  # type: ignore[arg-type]
    ],
)
def test_wrong_sizes_are_named(make_unit: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_unit()


def test_narrow_features_use_one_group_per_channel() -> None:
    assert SpatialGroupEnhance(16, groups=64).weight.shape == (16, 1, 1)


def test_the_units_are_registered_under_the_papers_names() -> None:
    assert set(UNITS) <= set(list_attention())
    assert list_attention() == sorted(list_attention())


@every_unit
def test_a_registered_name_attaches_its_class(name: str) -> None:
    model = attach(TinyNet(), name)
    assert type(model.stage1[0].dia) == UNITS[name]  # noqa: E721  # which it equals, with what attach() adds


def test_a_name_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match=r"'se' is already registered.*SqueezeExcitation"):
        register_attention("se")(DIALSTM)
    assert isinstance(attach(TinyNet(), "se").stage1[0].dia, SqueezeExcitation)


@pytest.mark.parametrize(
    ("typo", "meant"), [("dia_lstm", "dia-lstm"), ("dialstm", "dia-lstm"), ("cbma", "cbam"), ("SE", "se")]
)
def test_a_typo_names_what_was_meant(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Unknown attention {typo!r}. Did you mean '{meant}'")) as error:
        attach(TinyNet(), typo)
    assert all(name in str(error.value) for name in UNITS)


@pytest.mark.parametrize(("name", "argument"), [("dia-lstm", "reducton"), ("eca", "reduction"), ("sge", "cells")])
def test_an_argument_that_the_unit_does_not_take_is_named_with_those_it_takes(name: str, argument: str) -> None:
    options: dict[str, Any] = {argument: 4}
    with pytest.raises(ValueError, match=f"Attention '{name}'.*'{argument}'.*Its arguments are: ") as error:
        attach(TinyNet(), name, **options)
    accepted = str(error.value).partition("Its arguments are: ")[2]
    assert accepted.startswith({"dia-lstm": "reduction, cells", "eca": "kernel_size", "sge": "groups"}[name])


def test_the_width_of_a_bottleneck_is_at_least_one() -> None:
    assert SqueezeExcitation(8, reduction=16).reduce.out_features == 1
    assert DIALSTM(3, reduction=4).input_reduce.out_features == 1
    assert math.prod(DIALSTM(256, reduction=20).input_reduce.weight.shape) == 12 * 256
