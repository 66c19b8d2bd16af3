"""Several forwards at once: threads, nesting, replicas, interleaved streams."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import attach

from .networks import (
    TinyNet,
    images,
    outstanding,
    randomised,
)
from .running import Pair, by_block

# several forwards at once


def in_threads(runs: list[Any]) -> list[Tensor]:
    outputs: dict[int, Tensor] = {}

    def run(number: int) -> None:
        outputs[number] = runs[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outputs[number] for number in range(len(runs))]


def test_two_threads_on_one_network_do_not_mix(tiny: Pair) -> None:
    attached = tiny[1]
    batches = [images(2, seed=seed) for seed in range(2)]
    expected = [attached(batch) for batch in batches]
    barrier = threading.Barrier(2, timeout=20)
    for block in (attached.stage1[0], attached.stage1[1], attached.stage3[2]):
        for layer in (block.conv1, block.bn2):
            layer.register_forward_hook(lambda *_: [barrier.wait(), None][1])
    outputs = in_threads([lambda batch=batch: attached(batch) for batch in batches])
    assert all(torch.equal(output, target) for output, target in zip(outputs, expected, strict=True))


class NestingBlock(BasicBlock):  # type: ignore[misc]
    """Runs the whole network again in the middle of its own forward."""

    inner: Callable[[], Tensor] | None = None

    def forward(self, value: Tensor) -> Tensor:
        if self.inner is not None:
            inner, self.inner = self.inner, None
            inner()
        output: Tensor = super().forward(value)
        return output


def nesting_network() -> nn.Module:
    model = nn.Sequential(*(NestingBlock(8, 8) for _ in range(4))).double().eval()
    return randomised(attach(model, "dia-lstm"))


def test_a_forward_inside_a_forward_changes_neither() -> None:
    attached: Any = nesting_network()
    outer, inner = (torch.randn(2, 8, 6, 6, dtype=torch.float64) for _ in range(2))
    expected_outer, expected_inner = attached(outer), attached(inner)
    for index in range(4):
        seen: list[Tensor] = []
        attached[index].inner = lambda seen=seen: seen.append(attached(inner))
        assert torch.equal(attached(outer), expected_outer)
        assert torch.equal(seen[0], expected_inner)
    assert outstanding() == 0


def test_a_nested_forward_that_fails_leaves_the_outer_one_intact() -> None:
    attached: Any = nesting_network()
    outer = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = attached(outer)

    def fail() -> Tensor:
        with pytest.raises(RuntimeError):
            attached[1](attached[0](outer)[:, :4])
        return outer

    attached[2].inner = fail
    assert torch.equal(attached(outer), expected)
    assert outstanding() == 0


def test_a_forward_between_two_blocks_of_another_changes_neither(tiny: Pair) -> None:
    attached = tiny[1]
    expected, expected_other = attached(images()), attached(images(3, seed=1))

    def run(block: nn.Module, features: Tensor) -> Tensor:
        assert torch.equal(attached(images(3, seed=1)), expected_other)
        output: Tensor = block(features)
        return output

    assert torch.equal(by_block(attached, images(), run), expected)


def replicated(network: TinyNet) -> TinyNet:
    """Return a replica like those of nn.DataParallel, with its own parameters."""
    replicas: dict[Any, Any] = {
        module: module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        for module in network.modules()
    }
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            replica._parameters.pop(name, None)
            setattr(replica, name, None if parameter is None else parameter * 1.5)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    copied: TinyNet = replicas[network]
    return copied


def test_a_data_parallel_replica_uses_its_own_unit(tiny: Pair) -> None:
    attached = tiny[1]
    replica = replicated(attached)
    scaled = copy.deepcopy(attached)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(attached(images()), scaled(images()))
    assert torch.equal(replica(images()), scaled(images()))
    assert torch.equal(replica(images()), scaled(images()))


def test_replicas_in_threads_do_not_mix(tiny: Pair) -> None:
    attached = tiny[1]
    replicas = [replicated(attached), replicated(attached)]
    expected = [replica(images(seed=seed)) for seed, replica in enumerate(replicas)]
    barrier = threading.Barrier(2, timeout=20)
    for replica in replicas:
        for block in (replica.stage1[0], replica.stage3[2]):
            block.bn2.register_forward_hook(lambda *_: [barrier.wait(), None][1])
    runs = [lambda seed=seed, replica=replica: replica(images(seed=seed)) for seed, replica in enumerate(replicas)]
    outputs = in_threads(runs)
    assert all(torch.equal(output, target) for output, target in zip(outputs, expected, strict=True))


def test_two_streams_that_go_through_a_stage_in_turn_do_not_mix(tiny: Pair) -> None:
    attached = tiny[1]
    u, v = images(seed=1), images(seed=2)
    expected = [attached(u), attached(v)]
    u, v = attached.stem(u), attached.stem(v)
    for stage in (attached.stage1, attached.stage2, attached.stage3):
        for block in stage:
            u = block(u)
            v = block(v)
    outputs = [attached.head(stream.mean((2, 3))) for stream in (u, v)]
    assert all(torch.equal(output, target) for output, target in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no grad"])
def test_two_streams_with_code_between_the_blocks_are_exact_with_autograd_and_refused_without(
    tiny: Pair, grad: bool
) -> None:
    stage = tiny[1].stage1
    starts = [tiny[1].stem(images(seed=seed)) for seed in (1, 2)]
    expected = [stage[1](stage[0](start)) for start in starts]
    with torch.set_grad_enabled(grad):
        u, v = (stage[0](start) * 1 for start in starts)
        if grad:
            assert all(torch.equal(stage[1](stream), target) for stream, target in zip((u, v), expected, strict=True))
        else:
            with pytest.raises(RuntimeError, match="without the state of the blocks before it"):
                stage[1](u)


def test_cached_features_continue_with_the_state_that_belongs_to_them(tiny: Pair) -> None:
    attached = tiny[1]
    cached = attached.stage1[0](attached.stem(images()))
    expected = attached.stage1[2](attached.stage1[1](cached))
    attached(images(5, seed=3))
    attached.stage1[0](attached.stem(images(seed=4)))
    for _ in range(2):
        assert torch.equal(attached.stage1[2](attached.stage1[1](cached)), expected)
