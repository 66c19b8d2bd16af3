"""Activation checkpointing, backward in other threads, forwards inside backward."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .networks import (
    TinyNet,
    backward,
    exact_or_refused,
    gradients,
    images,
    largest_difference,
    outstanding,
    pair,
    total,
)
from .running import Pair, assert_gradients, by_block, checkpointed, directly, expected_gradients, staged

both_kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])

# activation checkpointing


@both_kinds
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing_whole_stages_gives_exact_gradients(tiny: Pair, forwards: int, reentrant: bool) -> None:
    batches = [images(seed=seed) for seed in range(forwards)]
    losses = [staged(tiny[1], batch, checkpointed(reentrant)).square().sum() for batch in batches]
    assert_gradients(tiny, total(losses), *batches)
    assert outstanding() == 0


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_checkpointing_single_blocks_gives_exact_gradients(tiny: Pair, forwards: int, early_stop: bool) -> None:
    batches = [images(seed=seed) for seed in range(forwards)]
    with set_checkpoint_early_stop(early_stop):
        losses = [by_block(tiny[1], batch, checkpointed(reentrant=False)).square().sum() for batch in batches]
        assert_gradients(tiny, total(losses), *batches)


def test_checkpointed_blocks_in_training_mode_give_exact_gradients() -> None:
    tiny = pair(TinyNet().double().train())
    loss = by_block(tiny[1], images(4), checkpointed(reentrant=False)).square().sum()
    assert_gradients(tiny, loss, images(4))


def test_backward_twice_gives_twice_the_gradients(tiny: Pair) -> None:
    loss = by_block(tiny[1], images(), checkpointed(reentrant=False)).square().sum()
    backward(loss, retain_graph=True)
    backward(loss)
    twice = {key: 2 * value for key, value in expected_gradients(tiny, images()).items()}
    assert largest_difference(gradients(tiny[1]), twice) <= 1e-12


def test_code_between_checkpointed_blocks_is_exact_with_two_forwards(tiny: Pair) -> None:
    def run(block: nn.Module, features: Tensor) -> Tensor:
        return checkpointed(reentrant=False)(block, features * 1)

    batches = [images(seed=seed) for seed in range(2)]
    losses = [by_block(tiny[1], batch, run).square().sum() for batch in batches]
    assert_gradients(tiny, total(losses), *batches)


def test_some_blocks_checkpointed_and_some_not_is_exact(tiny: Pair) -> None:
    chosen = {tiny[1].stage1[1], tiny[1].stage3[0], tiny[1].stage3[2]}

    def run(block: nn.Module, features: Tensor) -> Tensor:
        return checkpointed(reentrant=False)(block, features) if block in chosen else directly(block, features)

    batches = [images(seed=seed) for seed in range(2)]
    losses = [by_block(tiny[1], batch, run).square().sum() for batch in batches]
    assert_gradients(tiny, total(losses), *batches)


def test_a_forward_between_forward_and_backward_changes_nothing(tiny: Pair) -> None:
    loss = by_block(tiny[1], images(), checkpointed(reentrant=False)).square().sum()
    tiny[1](images(5, seed=9))
    tiny[1].stage1[0](tiny[1].stem(images(3, seed=8)))
    assert_gradients(tiny, loss, images())


def test_checkpointing_inside_a_checkpointed_stage_is_exact_or_refused(tiny: Pair) -> None:
    def run(stage: nn.Module, features: Tensor) -> Tensor:
        def blocks(value: Tensor) -> Tensor:
            for block in stage.children():
                value = checkpointed(reentrant=False)(block, value)
            return value

        output: Tensor = checkpoint(blocks, features, use_reentrant=False)
        return output

    loss = staged(tiny[1], images(), run).square().sum()
    with exact_or_refused("checkpoint whole stages"):
        backward(loss)
        assert largest_difference(gradients(tiny[1]), expected_gradients(tiny, images())) <= 1e-12


@pytest.mark.parametrize("forwards", [1, 2])
def test_reentrant_checkpointing_of_single_blocks_is_refused_with_the_fix(tiny: Pair, forwards: int) -> None:
    run = checkpointed(reentrant=True)
    loss = total(by_block(tiny[1], images(seed=seed), run).square().sum() for seed in range(forwards))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        backward(loss)
    assert outstanding() == 0
    tiny[1].zero_grad()
    assert_gradients(tiny, tiny[1](images()).square().sum(), images())


def test_a_recomputation_never_takes_the_state_of_a_forward_that_is_under_way(tiny: Pair) -> None:
    last = tiny[1].stage3[3]

    def run(block: nn.Module, features: Tensor) -> Tensor:
        return checkpointed(reentrant=True)(block, features) if block is last else directly(block, features)

    loss = by_block(tiny[1], images(), run).square().sum()
    features = tiny[1].stage2(tiny[1].stage1(tiny[1].stem(images(seed=1))))
    tiny[1].stage3[0](features)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        backward(loss)


@pytest.mark.parametrize("block", range(4))
def test_a_single_reentrantly_checkpointed_block_is_refused(tiny: Pair, block: int) -> None:
    chosen = tiny[1].stage3[block]

    def run(module: nn.Module, features: Tensor) -> Tensor:
        return checkpointed(reentrant=True)(module, features) if module is chosen else directly(module, features)

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        backward(by_block(tiny[1], images(), run).square().sum())


def test_offloading_with_checkpointed_blocks_is_exact(tiny: Pair) -> None:
    """The block gets a copy of its input that autograd still knows."""
    with save_on_cpu():
        loss = by_block(tiny[1], images(), checkpointed(reentrant=False)).square().sum()
    assert_gradients(tiny, loss, images())


def test_offloading_alone_is_exact(tiny: Pair) -> None:
    with save_on_cpu():
        loss = tiny[1](images()).square().sum()
    assert_gradients(tiny, loss, images())


@pytest.mark.parametrize("run", [by_block, staged])
def test_backward_in_another_thread_is_exact(tiny: Pair, run: Callable[..., Tensor]) -> None:
    losses = [run(tiny[1], images(seed=seed), checkpointed(reentrant=False)).square().sum() for seed in range(2)]
    loss = total(losses)
    thread = threading.Thread(target=backward, args=(loss,))
    thread.start()
    thread.join()
    batches = [images(seed=seed) for seed in range(2)]
    assert largest_difference(gradients(tiny[1]), expected_gradients(tiny, *batches)) <= 1e-12


class ForwardInBackward(torch.autograd.Function):
    """Identity whose backward runs a network first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, run: Callable[[], None]) -> Tensor:
        ctx.run = run
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.run()
        return grads[0], None


@pytest.mark.parametrize("with_grad", [False, True], ids=["no grad", "with a backward of its own"])
def test_a_forward_inside_a_backward_changes_nothing(tiny: Pair, with_grad: bool) -> None:
    attached = tiny[1]
    expected = attached(images(3, seed=5)).detach()
    outputs = []

    def inside() -> None:
        with torch.set_grad_enabled(with_grad):
            output = attached(images(3, seed=5))
            outputs.append(output.detach())
            if with_grad:
                torch.autograd.grad(output.sum(), list(attached.stem.parameters()))

    def run(block: nn.Module, features: Tensor) -> Tensor:
        output: Tensor = ForwardInBackward.apply(checkpointed(reentrant=False)(block, features), inside)
        return output

    loss = by_block(attached, images(), run).square().sum()
    assert_gradients(tiny, loss, images())
    assert len(outputs) == 8
    assert all(torch.equal(output, expected) for output in outputs)
    assert outstanding() == 0


def test_the_private_function_that_detects_a_backward_pass_still_exists() -> None:
    seen = []
    value = torch.ones(1, requires_grad=True)
    ForwardInBackward.apply(value, lambda: seen.append(torch._C._current_graph_task_id())).backward()
    assert torch._C._current_graph_task_id() == -1
    assert seen[0] != -1
