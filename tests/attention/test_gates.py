"""Gradients of a recurrent unit's weights, computed for all blocks at once, equal those of autograd block by block."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dia_lightning.attention import DIALSTM, DynamicSharingUnit, _recurrent

from .networks import backward, largest_difference

Gradients = dict[str, Tensor]
UNITS: dict[str, Callable[[], Any]] = {
    "dia-lstm": lambda: DIALSTM(6, reduction=2),
    "two cells": lambda: DIALSTM(6, reduction=2, cells=2, dropout=0.0),
    "dsu": lambda: DynamicSharingUnit(6, reduction=2),
}
units = pytest.mark.parametrize("name", UNITS)


def unit_of(name: str) -> Any:
    torch.manual_seed(0)
    return UNITS[name]().double()


def features(seed: int = 0, steps: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 6, 2, 2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(steps)]


def maps(unit: Any, seen: list[Tensor]) -> list[Tensor]:
    found, state = [], None
    for each in seen:
        attention_map, state = unit(each, state)
        found.append(attention_map)
    return found


def loss_of(found: list[Tensor]) -> Tensor:
    return torch.stack([(number + 1) * each.square().sum() for number, each in enumerate(found)]).sum()


@contextmanager
def one_by_one() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_recurrent, "gates_of_chain", lambda layers, state: None)
        yield


def gradients(unit: nn.Module) -> Gradients:
    return {name: parameter.grad for name, parameter in unit.named_parameters() if parameter.grad is not None}


def expected(unit: Any, run: Callable[[Any], Any]) -> Gradients:
    reference = copy.deepcopy(unit)
    with one_by_one():
        run(reference)
    return gradients(reference)


def assert_equal(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys()
    assert largest_difference(found, wanted) <= 1e-12


@units
def test_gradients_are_those_of_autograd(name: str) -> None:
    unit = unit_of(name)

    def run(unit: Any) -> None:
        backward(loss_of(maps(unit, features())))

    run(unit)
    assert_equal(gradients(unit), expected(unit, run))


@units
def test_maps_and_gradients_of_features_are_those_of_autograd(name: str) -> None:
    unit, seen, again = unit_of(name), features(), features()
    found = maps(unit, seen)
    backward(loss_of(found))
    with one_by_one():
        wanted = maps(unit, again)
        backward(loss_of(wanted))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for a, b in zip(seen, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


@units
def test_first_and_second_derivatives_are_exact(name: str) -> None:
    unit = unit_of(name)

    def run(*_: Tensor) -> Tensor:
        return loss_of(maps(unit, seen))

    seen = [each.detach()[:2, :, :1, :1].requires_grad_() for each in features(steps=2)]
    assert gradcheck(run, (*seen, *unit.parameters()), fast_mode=True)
    assert gradgradcheck(run, (*seen, *unit.parameters()), fast_mode=True)


@units
def test_a_gradient_penalty_has_the_gradients_of_autograd(name: str) -> None:
    unit = unit_of(name)

    def run(unit: Any) -> None:
        found = torch.autograd.grad(loss_of(maps(unit, features())), [*unit.parameters()], create_graph=True)
        backward(loss_of([*found]))

    run(unit)
    assert_equal(gradients(unit), expected(unit, run))


def test_gradients_for_a_penalty_leave_weights_out_that_were_frozen_after_forward() -> None:
    def penalised(unit: Any) -> Tensor:
        seen = features()
        loss = loss_of(maps(unit.requires_grad_(True), seen))
        unit.requires_grad_(False)
        (once,) = torch.autograd.grad(loss, seen[0], create_graph=True)
        return torch.autograd.grad(once.square().sum(), seen[0])[0]

    unit = unit_of("dia-lstm")
    found = penalised(unit)
    with one_by_one():
        torch.testing.assert_close(found, penalised(unit), rtol=1e-12, atol=1e-14)


def test_one_product_is_made_for_all_blocks() -> None:
    class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "mm" and output.shape in (expand, expand[::-1]):
                shapes.append(output.shape)
            return output

    unit, shapes = unit_of("dia-lstm"), []  # type: ignore[var-annotated]
    expand = tuple(unit.input_expand.weight.shape)
    loss = loss_of(maps(unit, features(steps=7)))
    with Products():  # type: ignore[no-untyped-call]
        backward(loss)
    assert len(shapes) == 2  # of the value and of the hidden state


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    unit = unit_of("dia-lstm")
    loss = loss_of(maps(unit, features()))
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    once = {name: gradient.clone() for name, gradient in gradients(unit).items()}
    torch.autograd.grad(loss, unit.input_reduce.weight, retain_graph=True)
    backward(loss)
    assert_equal(gradients(unit), {name: 2 * gradient for name, gradient in once.items()})


def test_gradients_of_some_weights_of_some_maps_or_of_features_alone_are_exact() -> None:
    unit, seen = unit_of("dia-lstm"), features()
    found = maps(unit, seen)
    with one_by_one():
        wanted = maps(unit, seen)
    for losses in ((loss_of(found), loss_of(wanted)), (found[1].sum(), wanted[1].sum())):
        for inputs in ([unit.hidden_expand.bias], [seen[0]], [seen[1], unit.input_reduce.weight], [*unit.parameters()]):
            a, b = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses)
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_gradients_of_a_batch_of_losses_are_exact() -> None:
    unit = unit_of("dia-lstm")
    losses = torch.stack([each.square().sum() for each in maps(unit, features())])
    each, parameters = torch.eye(len(losses), dtype=losses.dtype), [*unit.parameters()]
    found = torch.autograd.grad(losses, parameters, each, is_grads_batched=True, retain_graph=True)
    wanted = [torch.autograd.grad(losses, parameters, one, retain_graph=True) for one in each]
    for value, expected in zip(found, zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(value, torch.stack(expected), rtol=1e-12, atol=1e-13)


def test_gradients_can_be_scaled_in_place() -> None:
    unit = unit_of("dia-lstm")

    def scaled(unit: Any) -> list[Tensor]:
        found = torch.autograd.grad(loss_of(maps(unit, features())), [*unit.parameters()])
        return [gradient.mul_(0.5) for gradient in found]

    found = scaled(unit)
    with one_by_one():
        wanted = scaled(unit)
    assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-13) for x, y in zip(found, wanted, strict=True))


def test_nothing_is_left_of_a_backward_pass_that_failed() -> None:
    unit = unit_of("dia-lstm")

    def fail(gradient: Tensor) -> None:
        if armed:
            raise KeyError("stop")

    armed = [True]
    seen = features()
    found = maps(unit, seen)
    found[1].register_hook(fail)  # type: ignore[no-untyped-call]
    loss = loss_of(found)
    with pytest.raises(KeyError):
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    unit.zero_grad()
    armed.clear()
    backward(loss)
    assert_equal(gradients(unit), expected(unit, lambda unit: backward(loss_of(maps(unit, features())))))


def test_two_chains_and_two_batches_do_not_mix() -> None:
    unit = unit_of("dia-lstm")

    def run(unit: Any) -> None:
        states: list[Any] = [None, None]
        losses = []
        for step in range(3):
            for chain in range(2):
                attention_map, states[chain] = unit(features(chain)[step], states[chain])
                losses.append((step + chain) * attention_map.sum())
        backward(torch.stack(losses).sum())

    run(unit)
    assert_equal(gradients(unit), expected(unit, run))


@units
def test_a_state_that_goes_to_another_unit_leaves_every_unit_its_gradients(name: str) -> None:
    untied = nn.ModuleList(unit_of(name) for _ in range(3))

    def run(untied: Any) -> None:
        found, state = [], None
        for unit, each in zip(untied, features(), strict=False):
            attention_map, state = unit(each, state)
            found.append(attention_map)
        backward(loss_of(found))

    run(untied)
    assert_equal(gradients(untied), expected(untied, run))


@pytest.mark.parametrize("reentrant", [False, True])
def test_steps_that_are_recomputed_give_the_same(reentrant: bool) -> None:
    unit = unit_of("dia-lstm")

    def run(unit: Any) -> None:
        def step(seen: Tensor, hidden: Tensor | None, cell: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            attention_map, ((hidden, cell),) = unit(seen, None if hidden is None else ((hidden, cell),))
            return attention_map, hidden, cell

        found, hidden, cell = [], None, None
        for seen in features():
            attention_map, hidden, cell = checkpoint(step, seen, hidden, cell, use_reentrant=reentrant)
            found.append(attention_map)
        backward(loss_of(found))

    run(unit)
    assert_equal(gradients(unit), expected(unit, run))


def test_frozen_weights_and_foreign_layers_are_left_to_autograd() -> None:
    class Low(nn.Linear):
        """As of LoRA."""

        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    unit = unit_of("dia-lstm")
    unit.input_expand.weight.requires_grad_(False)
    calls: list[str] = []
    unit.hidden_reduce = Low(6, 3).double()
    unit.input_reduce.register_forward_hook(lambda module, args, output: calls.append("input_reduce"))

    def run(unit: Any) -> None:
        backward(loss_of(maps(unit, features())))

    wanted = expected(unit, run)
    calls.clear()
    run(unit)
    assert calls == ["input_reduce"] * 4
    assert_equal(gradients(unit), wanted)
    assert "input_expand.weight" not in wanted


def test_autocast_is_as_exact_as_autograd() -> None:
    unit = unit_of("dia-lstm").float()

    def run(unit: Any) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(maps(unit, [each.detach().float().requires_grad_() for each in features()]))
        backward(loss)

    run(unit)
    wanted = expected(unit, run)
    scale = max(gradient.abs().max().item() for gradient in wanted.values())
    assert all(gradient.dtype == torch.float32 for gradient in gradients(unit).values())
    assert largest_difference(gradients(unit), wanted) <= 0.02 * scale


def test_memory_is_free_after_backward_and_after_a_graph_that_was_dropped() -> None:
    unit = unit_of("dia-lstm")
    gc.collect()
    gc.disable()  # reference counts alone must suffice
    try:
        for goes_back in (True, False):
            seen = features()
            loss = loss_of(maps(unit, seen))
            alive = weakref.ref(seen[0])
            if goes_back:
                backward(loss)
            del seen, loss
            assert alive() is None
    finally:
        gc.enable()


def test_a_state_can_be_copied_and_saved() -> None:
    unit, (first, second, *_) = unit_of("dia-lstm"), features()
    _, state = unit(first, None)
    wanted, _ = unit(second, state)
    with torch.no_grad():
        copied = copy.deepcopy([[each.detach() for each in pair] for pair in state])
        assert torch.equal(unit(second, copied)[0], wanted)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(unit(second, loaded)[0], wanted)
    assert torch.equal(unit(second, pickle.loads(pickle.dumps(state)))[0], wanted)
