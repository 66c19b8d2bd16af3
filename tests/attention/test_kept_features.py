"""Features that other code keeps, sees or changes are not overwritten: units, hooks, modes, checkpoints."""

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dia_lightning.attention import DIALSTM, AttentionUnit, _recurrent
from dia_lightning.attention.dia_lstm import LSTMState

from .networks import exact_or_refused, gradients, largest_difference
from .residual import features, go_back, loss_of, network, plain_formulation


def test_norms_that_selective_checkpointing_keeps_are_left_alone() -> None:
    kept = [torch.ops.aten.native_batch_norm.default]
    model = network("batch norm")
    reference = copy.deepcopy(model)
    go_back(reference(features()))
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    go_back(checkpoint(model, features(), use_reentrant=False, context_fn=contexts))
    assert largest_difference(gradients(model), gradients(reference)) <= 1e-11


class WantsMore(AttentionUnit):
    """Claims to need only the mean, but differentiates the features too."""

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
    """Derived from a unit of the package before units took the mean."""

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


def test_a_map_of_another_shape_is_still_multiplied() -> None:
    model = network("batch norm", lambda channels: OneValue())
    batch = features().requires_grad_()
    with plain_formulation():
        (expected,) = torch.autograd.grad(loss_of(model(batch)), batch)
    (found,) = torch.autograd.grad(loss_of(model(batch)), batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


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
def test_functions_and_layers_changed_by_others_stay_changed(
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
    """Its state is the features of the previous block."""

    def forward(self, features: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen = features if state is None else features + state
        return torch.sigmoid(seen.amax((2, 3), keepdim=True)), features


class RemembersBesideTheMean(Remembers):
    """Also takes the mean."""

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
