"""The functions for squeeze and recalibration: the plain formulation's results, and what they save for backward."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from benchmarks.memory import saved_bytes
from dia_lightning.attention import AttentionUnit, attach

from .networks import backward, gradients, largest_difference
from .residual import LAST, Residual, conv, features, function_nodes, go_back, loss_of, network, plain_formulation

MEAN_UNITS = ("dia-lstm", "dsu", "se", "eca")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, torch.contiguous_format) for kind in LAST),
        ("batch norm", torch.channels_last),
        ("convolution", torch.channels_last),
        ("norm of volumes", torch.channels_last_3d),
    ],
)
def test_results_are_those_of_the_plain_formulation(kind: str, layout: torch.memory_format, training: bool) -> None:
    model = network(kind).train(training)
    reference = copy.deepcopy(model)
    batch = features(kind).to(memory_format=layout).requires_grad_()
    again = batch.detach().clone(memory_format=layout).requires_grad_()
    with plain_formulation():
        expected = reference(again)
        assert "_RecalibrateBackward" not in function_nodes(expected)
    go_back(expected)
    output = model(batch)
    assert "_RecalibrateBackward" in function_nodes(output)
    go_back(output)
    assert torch.equal(output, expected)
    assert batch.grad is not None
    torch.testing.assert_close(batch.grad, again.grad, rtol=1e-12, atol=1e-12)
    assert largest_difference(gradients(model), gradients(reference)) <= 1e-11
    for (key, value), wanted in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(value, wanted), key


@pytest.mark.parametrize("kind", ["batch norm", "convolution", "tokens"])
@pytest.mark.parametrize("positions", [1, 2])
def test_few_positions_are_enough(kind: str, positions: int) -> None:
    batch = features(kind)[:, :positions] if kind == "tokens" else features(kind)[:, :, :1, :positions]
    model = network(kind)
    reference = copy.deepcopy(model)
    with plain_formulation():
        go_back(reference(batch))
    for _ in range(3):  # the same, whatever uninitialised memory holds
        model.zero_grad()
        go_back(model(batch))
        assert largest_difference(gradients(model), gradients(reference)) <= 1e-11
        torch.full((4096,), float("nan"), dtype=torch.float64)


@pytest.mark.parametrize("name", [*MEAN_UNITS, "srm", "cbam"])
def test_every_unit_has_its_gradients(name: str) -> None:
    model = network("batch norm", name)
    reference = copy.deepcopy(model)
    with plain_formulation():
        go_back(reference(features()))
    output = model(features())
    assert ("_RecalibrateBackward" in function_nodes(output)) == (name in MEAN_UNITS)
    go_back(output)
    assert largest_difference(gradients(model), gradients(reference)) <= 1e-11


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["batch norm", "convolution"])
def test_first_and_second_derivatives_are_exact(kind: str, training: bool) -> None:
    model = network(kind, "se").train(training)[:1]

    def run(batch: Tensor, *_: Tensor) -> Tensor:
        output: Tensor = model(batch)
        return output

    batch = features()[:2, :, :2, :2].contiguous().requires_grad_()
    assert gradcheck(run, (batch, *model.parameters()), fast_mode=True)
    assert gradgradcheck(run, (batch, *model.parameters()), fast_mode=True)


def test_a_gradient_penalty_is_exact() -> None:
    def penalty(model: nn.Module) -> dict[str, Tensor]:
        batch = features().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(model(batch)), batch, create_graph=True)
        backward(gradient.square().sum())
        return gradients(model)

    model = network("batch norm")
    reference = copy.deepcopy(model)
    with plain_formulation():
        expected = penalty(reference)
    scale = max(value.abs().max().item() for value in expected.values())
    assert largest_difference(penalty(model), expected) <= 1e-11 * scale


def test_gradients_of_the_maps_alone_and_of_a_graph_that_is_kept_are_exact() -> None:
    model = network("batch norm", "se").requires_grad_(True)
    batch = features().requires_grad_()
    output = model(batch)
    first = torch.autograd.grad(output.square().sum(), batch, retain_graph=True)[0]
    unit = [*model[0].dia.parameters()]
    with plain_formulation():
        again = batch.detach().clone().requires_grad_()
        expected_output = model(again)
        expected = torch.autograd.grad(expected_output.square().sum(), [again, *unit], retain_graph=True)
    torch.testing.assert_close(first, expected[0], rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        torch.autograd.grad(output.square().sum(), unit, retain_graph=True), expected[1:], strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), batch)[0], expected[0], rtol=1e-12, atol=1e-12
    )


class Regularised(AttentionUnit):
    """Keeps its map for a loss of its own."""

    takes_mean = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, channels))
        self.kept: list[Tensor] = []

    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> tuple[Tensor, None]:
        mean = features.mean((2, 3)) if mean is None else mean
        attention_map = torch.sigmoid(self.weight * mean)[:, :, None, None]
        self.kept.append(attention_map)
        return attention_map, None


def test_a_loss_of_the_maps_alone_reaches_what_they_were_made_of() -> None:
    model = network("batch norm", Regularised)
    batch = features().requires_grad_()
    model(batch)
    (found,) = torch.autograd.grad(sum(kept.square().sum() for kept in model[0].dia.kept), batch)
    model[0].dia.kept.clear()
    with plain_formulation():
        model(batch)
    (expected,) = torch.autograd.grad(sum(kept.square().sum() for kept in model[0].dia.kept), batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_statistics_that_change_before_backward_do_not_change_the_gradient_of_a_map() -> None:
    found: list[tuple[Tensor, ...]] = []
    model = network("batch norm", "se")[:1]
    for one in (model, copy.deepcopy(model)):
        with plain_formulation() if found else nullcontext():
            output = one.eval()(features())
        one.train()(3 * features() + 1)
        found.append(torch.autograd.grad(output.square().sum(), [*one[0].dia.parameters()]))
    for value, wanted in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_batches_are_counted_as_the_norm_does() -> None:
    model = network("batch norm")
    model[0].last.track_running_stats = False
    model(features())
    assert [block.last.num_batches_tracked.item() for block in model] == [0, 1, 1]


def bytes_kept(model: nn.Module, batch: Tensor) -> int:
    return saved_bytes(lambda: model(batch), (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_output_of_a_batch_norm_is_not_kept(training: bool) -> None:
    plain = nn.Sequential(*(Residual(conv(6), nn.BatchNorm2d(6)) for _ in range(3))).double().train(training)
    batch = torch.randn(4, 6, 20, 20, dtype=torch.float64).requires_grad_()
    of_plain = bytes_kept(plain, batch)
    attached = attach(plain, "dia-lstm", sites="*.last", example=batch.detach())
    one_map = batch.numel() * batch.element_size()
    assert bytes_kept(attached, batch) <= of_plain + 0.1 * one_map
    with plain_formulation():
        assert bytes_kept(attached, batch) >= of_plain + 2.9 * one_map


@pytest.mark.parametrize("kind", ["batch norm", "convolution"])
def test_tangents_of_a_gradient_are_exact(kind: str) -> None:
    def tangent(model: nn.Module) -> Tensor:
        batch = features().requires_grad_()
        output = model(batch)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(output), output.detach())  # type: ignore[no-untyped-call]
            gradient = torch.autograd.grad(output, batch, dual)[0]
            found: Tensor = forward_ad.unpack_dual(gradient).tangent  # type: ignore[no-untyped-call]
        return found

    model = network(kind, "se").eval()
    with plain_formulation():
        expected = tangent(model)
    torch.testing.assert_close(tangent(model), expected, rtol=1e-11, atol=1e-11)


def test_mixed_precision_has_the_outputs_of_the_plain_formulation() -> None:
    model = network("batch norm").float()
    reference = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(features().float())
        with plain_formulation():
            expected = reference(features().float())
    assert torch.equal(output, expected)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    scale = max(value.abs().max().item() for value in gradients(reference).values())
    assert largest_difference(gradients(model), gradients(reference)) <= 0.02 * scale


def test_torch_func_takes_the_plain_formulation() -> None:
    model = network("batch norm").eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, values, (sample[None],))
        return output.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, features())
    for index, sample in enumerate(features()):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        assert largest_difference({k: v[index] for k, v in per_sample.items()}, gradients(model)) <= 1e-11
    tangent: Tensor = torch.func.jvp(model, (features(),), (torch.ones_like(features()),))[1]
    step = 1e-6
    difference = (model(features() + step) - model(features() - step)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)
