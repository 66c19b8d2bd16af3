"""Situations in which state could be lost or mixed, in networks of timm and diffusers.

``test_state.py`` covers the same, and more, for torchvision.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dia_lightning.attention import attach, detach
from dia_lightning.attention._attached_block import AttachedBlock
from tests.attention.libraries import Inputs, build, output
from tests.attention.networks import outstanding

NAMES = ("timm resnet18", "timm vit", "diffusers unet")


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Inputs, Tensor]:
    """A network with attention that matters, its inputs and its output."""
    plain, inputs = build(request.param, torch.float64)
    with torch.no_grad():
        without = output(plain, inputs)
        network = attach(plain, "dia-lstm")
        generator = torch.Generator().manual_seed(3)
        for block in blocks(network):
            for parameter in block.dia.parameters() if "dia" in block._modules else ():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
        expected = output(network, inputs)
    assert not torch.allclose(expected, without, rtol=1e-3)
    return network, inputs, expected


def blocks(network: nn.Module) -> Iterator[AttachedBlock]:
    return (module for module in network.modules() if isinstance(module, AttachedBlock))


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return tuple(change(arg) if arg.is_floating_point() else arg for arg in inputs[0]), inputs[1]


def in_the_middle(network: nn.Module, action: Callable[[], object]) -> Any:
    """Do something once, when the second block of the network is about to run."""
    second = list(blocks(network))[1]

    def once(*_: object) -> None:
        handle.remove()
        action()

    handle = second.register_forward_pre_hook(once)
    return handle


def test_an_exception_in_mid_stage_leaves_nothing(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, expected = case

    def fail() -> None:
        raise InterruptedError

    in_the_middle(network, fail)
    with pytest.raises(InterruptedError):
        output(network, inputs)
    assert torch.equal(output(network, inputs), expected)
    assert outstanding() == 0


def test_a_forward_of_the_network_inside_its_own_forward(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, expected = case
    inner: list[Tensor] = []
    in_the_middle(network, lambda: inner.append(output(network, changed(inputs, lambda tensor: -tensor))))
    assert torch.equal(output(network, inputs), expected)
    assert torch.equal(inner[0], output(network, changed(inputs, lambda tensor: -tensor)))


@pytest.mark.parametrize("case", NAMES[:2], indirect=True)  # diffusers' own networks do not run as replicas
def test_a_replica_uses_its_own_attention(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, expected = case
    memo: dict[int, nn.Module] = {}

    def replicate(module: nn.Module) -> nn.Module:
        if id(module) not in memo:
            replica = memo[id(module)] = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else replicate(child)
            for name, parameter in module._parameters.items():
                replica.__dict__[name] = None if parameter is None else parameter.detach().clone()
        return memo[id(module)]

    replica = replicate(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(output(replica, inputs), expected)


def test_threads_that_wait_for_each_other_in_mid_stage(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, _ = case
    variants = [inputs, changed(inputs, lambda tensor: -tensor)]
    with torch.no_grad():
        expected = [output(network, variant) for variant in variants]
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_: object) -> None:
        barrier.wait()

    for block in blocks(network):
        block.register_forward_pre_hook(wait)
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            found[index] = output(network, variants[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(2))


def test_reentrant_checkpoints_of_single_blocks_are_refused(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, _ = case
    for block in blocks(network):
        forward = block.forward
        block.forward = lambda *args, forward=forward, **kwargs: checkpoint(  # type: ignore[method-assign]
            lambda *inner: forward(*inner, **kwargs), *args, use_reentrant=True
        )
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        torch.autograd.backward(output(network, inputs).sum())


def test_a_backward_in_another_thread(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, _ = case
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()

    def gradients(in_thread: bool) -> list[Tensor]:
        network.zero_grad()
        loss = output(network, inputs).square().mean()
        if in_thread:
            thread = threading.Thread(target=torch.autograd.backward, args=(loss,))
            thread.start()
            thread.join()
        else:
            torch.autograd.backward(loss)
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    expected = gradients(in_thread=False)
    for block in blocks(network):
        forward = block.forward
        block.forward = lambda *args, forward=forward, **kwargs: checkpoint(  # type: ignore[method-assign]
            forward, *args, use_reentrant=False, **kwargs
        )
    found = gradients(in_thread=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_block_of_the_middle_called_alone_is_refused(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, _ = case
    seen: list[tuple[AttachedBlock, tuple[Any, ...]]] = []
    handles = [
        block.register_forward_pre_hook(lambda block, args: seen.append((block, args))) for block in blocks(network)
    ]
    output(network, inputs)
    for handle in handles:
        handle.remove()
    block, args = next((block, args) for block, args in seen if block.dia_links and block.dia_links[0].before)
    with pytest.raises(RuntimeError, match="without the state of the blocks before it"):
        block(*(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args))


def test_functional_call_with_other_weights(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, expected = case
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    wanted = output(other, inputs)
    for weights in (dict(other.state_dict()), {**dict(other.named_parameters()), **dict(other.named_buffers())}):
        value = functional_call(network, weights, inputs[0], inputs[1])
        found = value if isinstance(value, Tensor) else value.sample
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(output(network, inputs), expected)


def test_training_after_inference_mode(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, expected = case
    with torch.inference_mode():
        assert torch.equal(output(network, inputs), expected)
    torch.autograd.backward(output(network, inputs).sum())
    units = [parameter for name, parameter in network.named_parameters() if ".dia." in name]
    assert units
    assert all(parameter.grad is not None for parameter in units)


def test_forwards_that_are_given_up_hold_no_more_than_one_state(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, expected = case

    class GivenUpError(Exception):
        pass

    def give_up(*_: object) -> None:
        raise GivenUpError

    # A hook on what comes after the first block: the block itself has finished and left its handover.
    follower = list(blocks(network))[1]
    handle = follower.register_forward_pre_hook(give_up)
    for _ in range(20):
        with pytest.raises(GivenUpError):
            output(network, inputs)
    assert outstanding() == 0
    handle.remove()
    assert torch.equal(output(network, inputs), expected)


@pytest.mark.slow
def test_compiling_after_a_plain_network_was_compiled(case: tuple[nn.Module, Inputs, Tensor]) -> None:
    network, inputs, expected = case
    torch._dynamo.reset()
    plain: Any = torch.compile(detach(copy.deepcopy(network)), backend="eager")
    compiled: Any = torch.compile(network, backend="eager")
    with torch.no_grad():
        output(plain, inputs)
        found = output(compiled, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
