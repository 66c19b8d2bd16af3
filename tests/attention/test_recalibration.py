"""The functions for squeeze and recalibration: the plain formulation's results, and what they keep for backward."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.memory import saved_bytes
from dia_lightning.attention import DIALSTM, AttentionUnit, _recurrent, attach
from dia_lightning.attention import _recalibration as recalibration
from dia_lightning.attention.dia_lstm import LSTMState

from .networks import backward, exact_or_refused, gradients, largest_difference

MEAN_UNITS = ("dia-lstm", "dsu", "se", "eca")


class Residual(nn.Module):
    """A block whose branch ends in a layer of choice."""

    def __init__(self, body: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(self.body(x)))


def conv(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


def without_bias(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width)
    norm.bias = None  # type: ignore[assignment]
    return norm


LAST: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "batch norm": (conv, nn.BatchNorm2d),
    "norm without statistics": (conv, lambda width: nn.BatchNorm2d(width, track_running_stats=False)),
    "norm without momentum": (conv, lambda width: nn.BatchNorm2d(width, momentum=None)),
    "norm without weight": (conv, lambda width: nn.BatchNorm2d(width, affine=False)),
    "norm without bias": (conv, without_bias),
    "norm of volumes": (lambda width: nn.Conv3d(width, width, 1), nn.BatchNorm3d),
    "group norm": (conv, lambda width: nn.GroupNorm(2, width)),
    "convolution": (lambda width: nn.BatchNorm2d(width), conv),
    "tokens": (lambda width: nn.LayerNorm(width), lambda width: nn.Linear(width, width)),
}


def network(kind: str, name: str | Callable[[int], nn.Module] = "dia-lstm") -> Any:
    body, last = LAST[kind]
    plain = nn.Sequential(*(Residual(body(6), last(6)) for _ in range(3))).double()
    return attach(plain, name, sites="*.last", example=features(kind))


def features(kind: str = "batch norm") -> Tensor:
    shape = {"norm of volumes": (3, 6, 2, 3, 4), "tokens": (3, 7, 6)}.get(kind, (3, 6, 5, 4))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@contextmanager
def plain_formulation() -> Iterator[None]:
    threshold = recalibration.SMALL
    recalibration.SMALL = 2**62
    try:
        yield
    finally:
        recalibration.SMALL = threshold


def go_back(output: Tensor) -> None:
    backward(loss_of(output))


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).square().sum()


def function_nodes(output: Tensor) -> set[str]:
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(parent for parent, _ in node.next_functions)
    return {type(node).__name__ for node in seen}


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
    for _ in range(3):  # the same, whatever lies around in memory
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


def test_norms_that_selective_checkpointing_keeps_are_left_alone() -> None:
    kept = [torch.ops.aten.native_batch_norm.default]
    model = network("batch norm")
    reference = copy.deepcopy(model)
    go_back(reference(features()))
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    go_back(checkpoint(model, features(), use_reentrant=False, context_fn=contexts))
    assert largest_difference(gradients(model), gradients(reference)) <= 1e-11


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


class WantsMore(AttentionUnit):
    """Says that the mean is enough for it, and differentiates the features beside it."""

    takes_mean = True

    def __init__(self, channels: int, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, channels))
        self.of = of

    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> tuple[Tensor, None]:
        mean = features.mean((2, 3)) if mean is None else mean
        value = torch.sigmoid(self.weight * (mean + self.of(features)))
        return value[:, :, None, None], None


@pytest.mark.parametrize("of", [lambda y: y.sum((2, 3)), lambda y: y.amax((2, 3)), lambda y: y.std((2, 3))])
def test_a_unit_that_wants_more_than_the_mean_is_exact_or_refused(of: Callable[[Tensor], Tensor]) -> None:
    model = network("batch norm", lambda channels: WantsMore(channels, of))
    batch = features().requires_grad_()
    with plain_formulation():
        (expected,) = torch.autograd.grad(loss_of(model(batch)), batch)
    with exact_or_refused("modified by an inplace operation"):
        (found,) = torch.autograd.grad(loss_of(model(batch)), batch)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class WithoutMean(DIALSTM):
    """Made of a unit of the package, before units took the mean."""

    def forward(self, features: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:  # type: ignore[override]
        return super().forward(features.abs(), state)


def test_a_subclass_whose_forward_has_no_mean_is_given_none() -> None:
    model = network("batch norm", WithoutMean)
    with plain_formulation():
        expected = model(features())
    assert torch.equal(model(features()), expected)
    assert DIALSTM.takes_mean


class OneValue(AttentionUnit):
    """Gives every sample one value."""

    takes_mean = True

    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> tuple[Tensor, None]:
        mean = features.mean((2, 3)) if mean is None else mean
        return torch.sigmoid(mean.mean(1))[:, None, None, None], None


def test_a_map_of_another_shape_is_multiplied_as_ever() -> None:
    model = network("batch norm", lambda channels: OneValue())
    batch = features().requires_grad_()
    with plain_formulation():
        (expected,) = torch.autograd.grad(loss_of(model(batch)), batch)
    (found,) = torch.autograd.grad(loss_of(model(batch)), batch)
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


class Twice(TorchFunctionMode):
    """Doubles what two functions return."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return 2 * result if function in (nn.functional.batch_norm, nn.functional.linear) else result


def replaced(patch: pytest.MonkeyPatch) -> AbstractContextManager[Any]:
    for kind in (nn.BatchNorm2d, nn.Linear):
        forward: Any = kind.forward
        patch.setattr(kind, "forward", lambda self, x, forward=forward: 2 * forward(self, x))
    return nullcontext()


@pytest.mark.parametrize("change", [lambda patch: Twice(), replaced], ids=["mode", "forward"])
def test_functions_and_layers_that_somebody_changes_stay_changed(
    change: Callable[[pytest.MonkeyPatch], AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network("batch norm")
    reference = copy.deepcopy(model)
    with change(monkeypatch):
        output = model(features())
        with plain_formulation(), monkeypatch.context() as patch:
            patch.setattr(_recurrent, "gates_of_chain", lambda layers, state: None)
            expected = reference(features())
    assert torch.equal(output, expected)
    go_back(expected)
    go_back(output)
    assert largest_difference(gradients(model), gradients(reference)) <= 1e-11


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


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_a_site_see_what_they_saw_before(register: str) -> None:
    def seen(model: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        found: list[Tensor] = []
        handle = getattr(model[1].last, register)(lambda module, before, after: found.append((*after,)[0]))
        go_back(model(features().requires_grad_()))
        handle.remove()
        return found, gradients(model)

    model = network("batch norm")
    reference = copy.deepcopy(model)
    with plain_formulation():
        expected, expected_gradients = seen(reference)
    found, found_gradients = seen(model)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))
    assert len(found) == 1
    assert largest_difference(found_gradients, expected_gradients) <= 1e-11


def test_without_autograd_the_output_is_the_same_and_one_that_a_hook_keeps_is_left_alone() -> None:
    model = network("batch norm").eval()
    expected = model(features())
    with torch.no_grad():
        assert torch.equal(model(features()), expected)
        kept: list[Tensor] = []
        model[1].last.register_forward_hook(lambda module, args, output: kept.append(output))
        assert torch.equal(model(features()), expected)
        inner = model[0](features())
        model[1](inner)
        norm = copy.deepcopy(model[1].last)
        wanted = torch.nn.functional.batch_norm(
            model[1].body(inner), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps
        )
    assert torch.equal(kept[-1], wanted)


class Remembers(AttentionUnit):
    """Its state is the features of the block before."""

    def forward(self, features: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen = features if state is None else features + state
        return torch.sigmoid(seen.amax((2, 3), keepdim=True)), features


class RemembersBesideTheMean(Remembers):
    """Takes the mean, too."""

    takes_mean = True

    def forward(
        self, features: Tensor, state: Tensor | None = None, mean: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        value = features.mean((2, 3)) if mean is None else mean
        return torch.sigmoid(value if state is None else value + state.sum((2, 3)))[:, :, None, None], features


@pytest.mark.parametrize("unit", [Remembers, RemembersBesideTheMean])
def test_features_that_a_unit_keeps_are_left_alone(unit: Callable[[], AttentionUnit]) -> None:
    model = network("batch norm", lambda channels: unit()).eval()
    with plain_formulation():
        expected = model(features())
    assert torch.equal(model(features()), expected)
    with torch.no_grad():
        assert torch.equal(model(features()), expected)


def test_features_that_a_hook_on_a_unit_keeps_are_left_alone() -> None:
    model = network("batch norm", "se")
    kept: list[tuple[Tensor, Tensor]] = []
    model[0].dia.register_forward_hook(lambda unit, args, output: kept.append((args[0], args[0].detach().clone())))
    model(features())
    with torch.no_grad():
        model.eval()(features())
    assert len(kept) == 6
    assert all(torch.equal(one, other) for one, other in kept)


@pytest.mark.parametrize(
    "hook",
    [lambda module, args: (0.5 * args[0], *args[1:]), lambda module, args: args[0].register_hook(torch.neg) and None],
)
def test_a_hook_on_the_unit_changes_what_the_unit_takes(hook: Callable[..., Any]) -> None:
    model = network("batch norm")
    model[0].dia.register_forward_pre_hook(hook)
    reference = copy.deepcopy(model)
    with plain_formulation():
        expected = reference(features())
    output = model(features())
    assert torch.equal(output, expected)
    go_back(expected)
    go_back(output)
    assert largest_difference(gradients(model), gradients(reference)) <= 1e-11


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
