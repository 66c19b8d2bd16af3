"""The state of a shared unit in every situation in which it could be lost, mixed up or kept: exact or a clear error."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import attach

from .networks import (
    TinyNet,
    Weights,
    backward,
    exact_or_refused,
    gradients,
    images,
    largest_difference,
    outstanding,
    pair,
    randomised,
    threaded,
    threaded_gradients,
    total,
    unit_weights,
)

Pair = tuple[TinyNet, TinyNet]
both_kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def expected_gradients(networks: Pair, *batches: Tensor) -> Weights:
    """Gradients of the sum of squared logits of all batches, by hand."""
    plain, attached = networks
    units = unit_weights(attached)
    return threaded_gradients(plain, units, *(threaded(plain, units, batch).square().sum() for batch in batches))


def staged(model: TinyNet, batch: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Run a network stage by stage."""
    features = model.stem(batch)
    for stage in (model.stage1, model.stage2, model.stage3):
        features = run(stage, features)
    logits: Tensor = model.head(features.mean((2, 3)))
    return logits


def by_block(model: TinyNet, batch: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Run a network block by block."""

    def run_blocks(stage: nn.Module, features: Tensor) -> Tensor:
        for block in stage.children():
            features = run(block, features)
        return features

    return staged(model, batch, run_blocks)


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(module: nn.Module, features: Tensor) -> Tensor:
        output: Tensor = checkpoint(module, features, use_reentrant=reentrant)
        return output

    return run


def directly(module: nn.Module, features: Tensor) -> Tensor:
    output: Tensor = module(features)
    return output


def assert_gradients(networks: Pair, loss: Tensor, *batches: Tensor) -> None:
    backward(loss)
    assert largest_difference(gradients(networks[1]), expected_gradients(networks, *batches)) <= 1e-12


# S2, S3: batch mates and earlier forwards


def test_s2_a_sample_alone_gives_what_it_gives_in_a_batch(tiny: Pair) -> None:
    batch = images(4)
    torch.testing.assert_close(tiny[1](batch[2:3]), tiny[1](batch)[2:3], rtol=0, atol=1e-6)


def test_s2_other_batch_mates_change_nothing(resnet18_pair: tuple[nn.Module, nn.Module]) -> None:
    batch, attached = images(4, 64, dtype=torch.float32), resnet18_pair[1].float()
    with torch.no_grad():
        expected = attached(batch)
        batch[1:] = 50 * torch.randn_like(batch[1:])
        assert torch.equal(attached(batch)[:1], expected[:1])
        batch[1:] = torch.nan
        assert torch.equal(attached(batch)[:1], expected[:1])


def test_s3_a_previous_forward_changes_nothing(tiny: Pair) -> None:
    expected = tiny[1](images())
    for batch in (images(5, seed=1), images(1, seed=2), images(2, 9, seed=3)):
        tiny[1](batch)
        assert torch.equal(tiny[1](images()), expected)


@pytest.mark.parametrize(("batch", "size"), [(1, 12), (7, 12), (2, 8), (3, 17), (2, 1)])
def test_s3_other_batch_sizes_and_resolutions_are_exact(tiny: Pair, batch: int, size: int) -> None:
    plain, attached = tiny
    attached(images())
    value = images(batch, size, seed=4)
    torch.testing.assert_close(attached(value), threaded(plain, unit_weights(attached), value), rtol=0, atol=1e-12)


def test_s3_kernels_may_differ_between_batch_sizes_but_hardly(resnet18_pair: tuple[nn.Module, nn.Module]) -> None:
    attached, batch = resnet18_pair[1].float(), images(8, 64, dtype=torch.float32)
    with torch.no_grad():
        together, alone = attached(batch)[:1], attached(batch[:1])
    assert ((together - alone).abs().max() / together.abs().max()).item() <= 1e-5


# S4, S5, S26: nothing stays


class Interruption(BaseException):
    """Like KeyboardInterrupt, no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, Interruption])
@pytest.mark.parametrize("block", range(4))
def test_s4_an_exception_in_mid_stage_leaves_nothing_behind(tiny: Pair, block: int, error: type[BaseException]) -> None:
    attached = tiny[1]
    expected = attached(images())
    conv = attached.stage3[block].conv2
    weight = weakref.ref(conv.weight)

    def fail(value: Tensor) -> Tensor:
        raise error("on purpose")

    conv.forward = fail
    with pytest.raises(error, match="on purpose"):
        attached(images(3, seed=1))
    assert outstanding(attached) == 0
    assert weight() is not None
    del conv.forward
    assert torch.equal(attached(images()), expected)


def live_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def test_s5_nothing_is_held_after_a_forward(tiny: Pair) -> None:
    attached = tiny[1]
    attached(images())
    assert outstanding(attached) == 0
    before = live_tensors()
    attached(images())
    assert live_tensors() == before


def test_s5_forwards_without_backward_leak_nothing_even_without_the_garbage_collector(tiny: Pair) -> None:
    attached = tiny[1].train()
    attached(images(4))
    before = live_tensors()
    states = []
    attached.stage3[1].bn2.register_forward_hook(lambda *event: states.append(weakref.ref(event[2])))
    gc.disable()
    try:
        for _ in range(24):
            attached(images(4))
        assert len(states) == 24
        assert [state() for state in states] == [None] * 24
    finally:
        gc.enable()
    assert live_tensors() == before
    assert outstanding(attached) == 0


def test_s5_activations_of_a_stage_that_is_over_carry_no_state(tiny: Pair) -> None:
    features = tiny[1].stage1(tiny[1].stem(images()))
    assert not [value for value in vars(features).values() if value]


@pytest.mark.parametrize("early_stop", [True, False])
def test_s5_nothing_is_held_after_a_backward_that_recomputed_blocks(tiny: Pair, early_stop: bool) -> None:
    with set_checkpoint_early_stop(early_stop):
        backward(by_block(tiny[1], images(), checkpointed(reentrant=False)).sum())
    assert outstanding(tiny[1]) == 0


def test_s26_forwards_abandoned_in_mid_stage_are_not_held(tiny: Pair) -> None:
    plain, attached = tiny
    features = attached.stem(images()).detach()
    states = []
    for _ in range(200):
        output = attached.stage1[1](attached.stage1[0](features))
        states.append(weakref.ref(output))
        del output
    assert outstanding(attached) <= 1
    assert sum(state() is not None for state in states) <= 1
    torch.testing.assert_close(
        attached(images()), threaded(plain, unit_weights(attached), images()), rtol=0, atol=1e-12
    )
    assert outstanding(attached) == 0


# S6: copies


def test_s6_a_deep_copy_after_a_training_forward_uses_its_own_unit(tiny: Pair) -> None:
    attached = tiny[1]
    output = attached(images())
    other = copy.deepcopy(attached)
    assert torch.equal(other(images()), output)
    with torch.no_grad():
        other.stage1[0].dia.input_expand.weight.zero_()
    assert not torch.allclose(other(images()), output)
    assert torch.equal(attached(images()), output)


def test_s6_a_deep_copy_in_mid_forward_starts_empty(tiny: Pair) -> None:
    attached = tiny[1]
    features = attached.stage3[0](attached.stage2(attached.stage1(attached.stem(images()))))
    other = copy.deepcopy(attached)
    assert outstanding(other) == 0
    with pytest.raises(RuntimeError, match="Block 1 of a stage"):
        other.stage3[1](features)


def test_s6_an_averaged_copy_follows_the_average_and_not_the_original(tiny: Pair) -> None:
    plain, attached = tiny
    averaged = AveragedModel(
        attached,
        multi_avg_fn=get_ema_multi_avg_fn(0.5),  # type: ignore[no-untyped-call]
    )
    averaged.update_parameters(attached)
    start = {key: value.clone() for key, value in attached.state_dict().items()}
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.mul_(1.1)
    averaged.update_parameters(attached)
    for key, value in attached.state_dict().items():
        if value.is_floating_point() and "running" not in key:
            torch.testing.assert_close(averaged.module.state_dict()[key], 0.5 * (start[key] + value))
    plain.load_state_dict(averaged.module.state_dict(), strict=False)
    expected = threaded(plain, unit_weights(averaged.module), images())
    torch.testing.assert_close(averaged(images()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_s6_a_pickled_network_works(tiny: Pair, protocol: int) -> None:
    attached = tiny[1]
    attached(images())
    other = pickle.loads(pickle.dumps(attached, protocol=protocol))
    assert torch.equal(other(images()), attached(images()))
    assert type(other.stage1[0]) is type(attached.stage1[0])


def test_s6_torch_saves_and_loads_a_whole_network(tiny: Pair) -> None:
    buffer = io.BytesIO()
    torch.save(tiny[1], buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(images()), tiny[1](images()))


def test_s6_a_shallow_copy_of_a_block_stays_attached(tiny: Pair) -> None:
    block = copy.copy(tiny[1].stage2[0])
    features = tiny[1].stage1(tiny[1].stem(images()))
    assert torch.equal(block(features), tiny[1].stage2[0](features))


def test_s6_a_saved_activation_leaves_the_state_behind_and_loads_with_weights_only(tiny: Pair) -> None:
    features = tiny[1].stage1[0](tiny[1].stem(images()))
    buffer = io.BytesIO()
    torch.save(features, buffer)
    assert buffer.tell() < 2 * features.numel() * 8 + 4000
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded, features)
    assert not any(vars(loaded).values())


def test_s6_a_deep_copied_activation_leaves_the_state_behind(tiny: Pair) -> None:
    with torch.no_grad():
        features = tiny[1].stage1[0](tiny[1].stem(images()))
    assert any(vars(features).values())
    assert not any(vars(copy.deepcopy(features)).values())


# S7, S8, S9, S25: several forwards at once


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


def test_s7_two_threads_on_one_network_do_not_mix(tiny: Pair) -> None:
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


def test_s8_a_forward_inside_a_forward_changes_neither() -> None:
    attached: Any = nesting_network()
    outer, inner = (torch.randn(2, 8, 6, 6, dtype=torch.float64) for _ in range(2))
    expected_outer, expected_inner = attached(outer), attached(inner)
    for index in range(4):
        seen: list[Tensor] = []
        attached[index].inner = lambda seen=seen: seen.append(attached(inner))
        assert torch.equal(attached(outer), expected_outer)
        assert torch.equal(seen[0], expected_inner)
    assert outstanding(attached) == 0


def test_s8_a_nested_forward_that_fails_leaves_the_outer_one_intact() -> None:
    attached: Any = nesting_network()
    outer = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = attached(outer)

    def fail() -> Tensor:
        with pytest.raises(RuntimeError):
            attached[1](attached[0](outer)[:, :4])
        return outer

    attached[2].inner = fail
    assert torch.equal(attached(outer), expected)
    assert outstanding(attached) == 0


def test_s8_a_forward_between_two_blocks_of_another_changes_neither(tiny: Pair) -> None:
    attached = tiny[1]
    expected, expected_other = attached(images()), attached(images(3, seed=1))

    def run(block: nn.Module, features: Tensor) -> Tensor:
        assert torch.equal(attached(images(3, seed=1)), expected_other)
        output: Tensor = block(features)
        return output

    assert torch.equal(by_block(attached, images(), run), expected)


def replicated(network: TinyNet) -> TinyNet:
    """Return a replica as nn.DataParallel makes it, with parameters of its own."""
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


def test_s9_a_data_parallel_replica_uses_its_own_unit(tiny: Pair) -> None:
    attached = tiny[1]
    replica = replicated(attached)
    scaled = copy.deepcopy(attached)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(attached(images()), scaled(images()))
    assert torch.equal(replica(images()), scaled(images()))
    assert torch.equal(replica(images()), scaled(images()))


def test_s9_replicas_in_threads_do_not_mix(tiny: Pair) -> None:
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


def test_s25_two_streams_that_go_through_a_stage_in_turn_do_not_mix(tiny: Pair) -> None:
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


def test_s25_two_streams_with_code_between_the_blocks_are_refused_before_they_give_a_result(tiny: Pair) -> None:
    attached = tiny[1]
    u, v = (attached.stage1[0](attached.stem(images(seed=seed))) * 1 for seed in (1, 2))
    attached.stage1[1](u)
    with pytest.raises(RuntimeError, match="without the state of the blocks before it"):
        attached.stage1[1](v)


def test_s25_cached_features_continue_with_the_state_that_belongs_to_them(tiny: Pair) -> None:
    attached = tiny[1]
    cached = attached.stage1[0](attached.stem(images()))
    expected = attached.stage1[2](attached.stage1[1](cached))
    attached(images(5, seed=3))
    attached.stage1[0](attached.stem(images(seed=4)))
    for _ in range(2):
        assert torch.equal(attached.stage1[2](attached.stage1[1](cached)), expected)


# S10 to S13: activation checkpointing


@both_kinds
@pytest.mark.parametrize("forwards", [1, 2])
def test_s10_checkpointing_whole_stages_gives_exact_gradients(tiny: Pair, forwards: int, reentrant: bool) -> None:
    batches = [images(seed=seed) for seed in range(forwards)]
    losses = [staged(tiny[1], batch, checkpointed(reentrant)).square().sum() for batch in batches]
    assert_gradients(tiny, total(losses), *batches)
    assert outstanding(tiny[1]) == 0


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_s11_checkpointing_single_blocks_gives_exact_gradients(tiny: Pair, forwards: int, early_stop: bool) -> None:
    batches = [images(seed=seed) for seed in range(forwards)]
    with set_checkpoint_early_stop(early_stop):
        losses = [by_block(tiny[1], batch, checkpointed(reentrant=False)).square().sum() for batch in batches]
        assert_gradients(tiny, total(losses), *batches)


def test_s11_checkpointed_blocks_in_training_mode_give_exact_gradients() -> None:
    tiny = pair(TinyNet().double().train())
    loss = by_block(tiny[1], images(4), checkpointed(reentrant=False)).square().sum()
    assert_gradients(tiny, loss, images(4))


def test_s11_backward_twice_gives_twice_the_gradients(tiny: Pair) -> None:
    loss = by_block(tiny[1], images(), checkpointed(reentrant=False)).square().sum()
    backward(loss, retain_graph=True)
    backward(loss)
    twice = {key: 2 * value for key, value in expected_gradients(tiny, images()).items()}
    assert largest_difference(gradients(tiny[1]), twice) <= 1e-12


def test_s11_code_between_checkpointed_blocks_is_exact_with_two_forwards(tiny: Pair) -> None:
    def run(block: nn.Module, features: Tensor) -> Tensor:
        return checkpointed(reentrant=False)(block, features * 1)

    batches = [images(seed=seed) for seed in range(2)]
    losses = [by_block(tiny[1], batch, run).square().sum() for batch in batches]
    assert_gradients(tiny, total(losses), *batches)


def test_s11_some_blocks_checkpointed_and_some_not_is_exact(tiny: Pair) -> None:
    chosen = {tiny[1].stage1[1], tiny[1].stage3[0], tiny[1].stage3[2]}

    def run(block: nn.Module, features: Tensor) -> Tensor:
        return checkpointed(reentrant=False)(block, features) if block in chosen else directly(block, features)

    batches = [images(seed=seed) for seed in range(2)]
    losses = [by_block(tiny[1], batch, run).square().sum() for batch in batches]
    assert_gradients(tiny, total(losses), *batches)


def test_s11_a_forward_between_forward_and_backward_changes_nothing(tiny: Pair) -> None:
    loss = by_block(tiny[1], images(), checkpointed(reentrant=False)).square().sum()
    tiny[1](images(5, seed=9))
    tiny[1].stage1[0](tiny[1].stem(images(3, seed=8)))
    assert_gradients(tiny, loss, images())


def test_s11_checkpointing_inside_a_checkpointed_stage_is_exact_or_refused(tiny: Pair) -> None:
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
def test_s12_reentrant_checkpointing_of_single_blocks_is_refused_with_the_fix(tiny: Pair, forwards: int) -> None:
    run = checkpointed(reentrant=True)
    loss = total(by_block(tiny[1], images(seed=seed), run).square().sum() for seed in range(forwards))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        backward(loss)
    assert outstanding(tiny[1]) == 0
    tiny[1].zero_grad()
    assert_gradients(tiny, tiny[1](images()).square().sum(), images())


def test_s12_a_recomputation_never_takes_the_state_of_a_forward_that_is_under_way(tiny: Pair) -> None:
    last = tiny[1].stage3[3]

    def run(block: nn.Module, features: Tensor) -> Tensor:
        return checkpointed(reentrant=True)(block, features) if block is last else directly(block, features)

    loss = by_block(tiny[1], images(), run).square().sum()
    features = tiny[1].stage2(tiny[1].stage1(tiny[1].stem(images(seed=1))))
    tiny[1].stage3[0](features)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        backward(loss)


@pytest.mark.parametrize("block", range(4))
def test_s12_a_single_reentrantly_checkpointed_block_is_refused(tiny: Pair, block: int) -> None:
    chosen = tiny[1].stage3[block]

    def run(module: nn.Module, features: Tensor) -> Tensor:
        return checkpointed(reentrant=True)(module, features) if module is chosen else directly(module, features)

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        backward(by_block(tiny[1], images(), run).square().sum())


def test_s12_offloading_with_checkpointed_blocks_is_refused(tiny: Pair) -> None:
    with save_on_cpu():
        loss = by_block(tiny[1], images(), checkpointed(reentrant=False)).square().sum()
    with pytest.raises(RuntimeError, match="save_on_cpu"):
        backward(loss)


def test_s12_offloading_alone_is_exact(tiny: Pair) -> None:
    with save_on_cpu():
        loss = tiny[1](images()).square().sum()
    assert_gradients(tiny, loss, images())


@pytest.mark.parametrize("run", [by_block, staged])
def test_s13_backward_in_another_thread_is_exact(tiny: Pair, run: Callable[..., Tensor]) -> None:
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
def test_s13_a_forward_inside_a_backward_changes_nothing(tiny: Pair, with_grad: bool) -> None:
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
    assert outstanding(attached) == 0


def test_the_private_function_that_tells_a_backward_pass_is_still_there() -> None:
    seen = []
    value = torch.ones(1, requires_grad=True)
    ForwardInBackward.apply(value, lambda: seen.append(torch._C._current_graph_task_id())).backward()
    assert torch._C._current_graph_task_id() == -1
    assert seen[0] != -1


# S14, S15: stages run in other ways


def test_s14_a_stage_iterated_from_outside_is_exact(tiny: Pair) -> None:
    assert torch.equal(by_block(tiny[1], images(), directly), tiny[1](images()))


def test_s14_a_stage_iterated_from_outside_with_code_between_is_exact(tiny: Pair) -> None:
    output = by_block(tiny[1], images(), lambda block, features: block(features * 1))
    torch.testing.assert_close(output, tiny[1](images()), rtol=0, atol=0)


def test_s14_a_stage_called_by_keyword_is_exact(tiny: Pair) -> None:
    output = by_block(tiny[1], images(), lambda block, features: block(x=features))
    assert torch.equal(output, tiny[1](images()))


def test_s14_a_truncated_stage_does_not_change_the_next_forward(tiny: Pair) -> None:
    attached = tiny[1]
    expected = attached(images())
    features = attached.stem(images(3, seed=1))
    for stop in (1, 2):
        truncated: Tensor = attached.stage1[:stop](features)
        assert truncated.shape == features.shape
        assert torch.equal(attached(images()), expected)


def test_s15_a_block_of_the_middle_called_alone_is_refused(tiny: Pair) -> None:
    attached = tiny[1]
    features = attached.stem(images())
    for index in (1, 2):
        with pytest.raises(RuntimeError, match=f"Block {index} of a stage with shared attention was called without"):
            attached.stage1[index](features)
    attached(images())
    with pytest.raises(RuntimeError, match="Block 1 of a stage"):
        attached.stage1[1](features)
    assert outstanding(attached) == 0


def test_s15_the_first_block_alone_is_exact(tiny: Pair) -> None:
    plain, attached = tiny
    one_block = nn.Sequential(plain.stage1[0])
    value = attached.stem(images())
    reference = attach(copy.deepcopy(one_block), "dia-lstm")
    weights = {key: value for key, value in attached.stage1[:1].state_dict().items() if key.startswith("0.")}
    reference.load_state_dict(weights)
    assert torch.equal(attached.stage1[0](value), reference(value))


@pytest.mark.parametrize("skipped", [1, 2])
def test_s15_a_skipped_block_of_the_middle_hands_the_state_on_unchanged(tiny: Pair, skipped: int) -> None:
    plain, attached = tiny
    chosen = attached.stage3[skipped]
    output = by_block(attached, images(), lambda block, value: value if block is chosen else block(value))
    shortened = copy.deepcopy(plain)
    del shortened.stage3[skipped]
    expected = threaded(shortened, unit_weights(attached), images())
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_s15_skipping_the_first_block_is_refused(tiny: Pair) -> None:
    with pytest.raises(RuntimeError, match="Block 1 of a stage"):
        tiny[1].stage1[1:](tiny[1].stem(images()))


def test_s15_the_same_block_twice_is_refused(tiny: Pair) -> None:
    features = tiny[1].stage1[0](tiny[1].stem(images()))
    features = tiny[1].stage1[1](features)
    with pytest.raises(RuntimeError, match="each once per forward"):
        tiny[1].stage1[1](features)


def test_s15_a_site_called_outside_of_its_block_is_refused(tiny: Pair) -> None:
    with pytest.raises(RuntimeError, match="called outside of its block"):
        tiny[1].stage1[1].bn2(tiny[1].stem(images()))


# S16, S17: networks that others take apart or convert


def own_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".dia." in name)


def test_s16_an_intermediate_layer_getter_keeps_and_trains_every_unit(
    resnet18_pair: tuple[nn.Module, nn.Module],
) -> None:
    plain, attached = resnet18_pair
    getter = IntermediateLayerGetter(attached, {"layer2": "a", "layer4": "b"})
    assert own_parameters(getter) == own_parameters(attached) > 0
    outputs = getter(images(2, 64))
    expected = threaded(plain, unit_weights(attached), images(2, 64))
    logits = cast(Any, attached).fc(outputs["b"].mean((2, 3)))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in getter.parameters())


def test_s16_a_feature_pyramid_keeps_and_trains_every_unit() -> None:
    attached = attach(resnet18(), "dia-lstm")
    returned = {f"layer{k}": str(k) for k in (1, 2, 3, 4)}
    pyramid = BackboneWithFPN(attached, returned, [64, 128, 256, 512], 16)
    assert own_parameters(pyramid) == own_parameters(attached) > 0
    sum(level.square().mean() for level in pyramid(images(2, 64, dtype=torch.float32)).values()).backward()
    assert all(parameter.grad is not None for parameter in pyramid.body.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["dia-lstm", "srm", "cbam"])
def test_s17_conversion_to_synchronised_norms_keeps_the_attention(name: str, training: bool) -> None:
    _, attached = pair(TinyNet().double().train(training), name)
    expected = copy.deepcopy(attached)(images(4))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(attached))  # type: ignore[no-untyped-call]
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    torch.testing.assert_close(converted(images(4)), expected, rtol=0, atol=1e-12)
    assert converted.state_dict().keys() == attached.state_dict().keys()


def test_s17_timms_norm_conversions_keep_the_attention(tiny: Pair) -> None:
    layers = pytest.importorskip("timm.layers")
    freeze = pytest.importorskip("timm.utils.model").freeze_batch_norm_2d
    expected = tiny[1](images())
    frozen = freeze(copy.deepcopy(tiny[1]))
    torch.testing.assert_close(frozen(images()), expected, rtol=0, atol=1e-10)
    converted = layers.convert_sync_batchnorm(copy.deepcopy(tiny[1]))
    torch.testing.assert_close(converted(images()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_s17_a_norm_replaced_after_attaching_is_noticed_and_leaves_nothing_behind(tiny: Pair, index: int) -> None:
    attached = tiny[1]
    attached.stage1[index].bn2 = nn.BatchNorm2d(8).double()
    with pytest.raises(RuntimeError, match=r"0 of 1 sites .* replaced after attach\(\)\? Call detach\(\) first"):
        attached(images())
    assert outstanding(attached) == 0


def test_s17_fusing_a_site_into_its_convolution_is_refused(tiny: Pair) -> None:
    block = tiny[1].stage1[1]
    block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
    with pytest.raises(RuntimeError, match="0 of 1 sites with attention ran"):
        tiny[1](images())


def test_s17_fusing_other_norms_is_exact(tiny: Pair) -> None:
    expected = tiny[1](images())
    for block in tiny[1].stage3:
        block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
    torch.testing.assert_close(tiny[1](images()), expected, rtol=0, atol=1e-12)


# S20, S21, S24: function transforms, inference mode, low precision


def test_s20_functional_call_with_named_parameters_is_exact(tiny: Pair) -> None:
    attached = tiny[1]
    other = randomised(copy.deepcopy(attached), seed=5)
    weights = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(functional_call(attached, weights, (images(),)), other(images()))


def test_s20_functional_call_with_a_state_dict_is_exact_or_refused(tiny: Pair) -> None:
    attached = tiny[1]
    before = attached(images())
    other = randomised(copy.deepcopy(attached), seed=5)
    try:
        output = functional_call(attached, dict(other.state_dict()), (images(),))
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError):
        output = other(images())
    torch.testing.assert_close(output, other(images()), rtol=0, atol=1e-12)
    assert torch.equal(attached(images()), before)


def test_s20_vmap_over_the_weights_of_an_ensemble_is_exact(tiny: Pair) -> None:
    members = [randomised(copy.deepcopy(tiny[1]), seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(members)
    batch = images()

    def run(parameters: Weights, buffers: Weights) -> Tensor:
        output: Tensor = functional_call(tiny[1], (parameters, buffers), (batch,))
        return output

    outputs = vmap(run)(parameters, buffers)
    expected = torch.stack([member(batch) for member in members])
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    assert outstanding(tiny[1]) == 0


def test_s20_gradients_per_sample_are_exact(tiny: Pair) -> None:
    attached = tiny[1]
    parameters = {name: parameter.detach() for name, parameter in attached.named_parameters()}

    def loss(parameters: Weights, image: Tensor) -> Tensor:
        output: Tensor = functional_call(attached, parameters, (image[None],)).square().sum()
        return output

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, images(3))
    for sample in range(3):
        attached.zero_grad()
        attached(images(3)[sample : sample + 1]).square().sum().backward()
        for name, parameter in attached.named_parameters():
            torch.testing.assert_close(per_sample[name][sample], parameter.grad, rtol=1e-10, atol=1e-12)


def test_s20_a_directional_derivative_equals_finite_differences(tiny: Pair) -> None:
    direction = images(seed=3)
    slope = jvp(tiny[1], (images(),), (direction,))[1]
    step = 1e-6
    expected = (tiny[1](images() + step * direction) - tiny[1](images() - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


def test_s20_second_derivatives_equal_those_of_the_network_threaded_by_hand(tiny: Pair) -> None:
    plain, attached = tiny
    units = unit_weights(attached)
    found = []
    for run in (attached, lambda batch: threaded(plain, units, batch)):
        batch = images().requires_grad_()
        (first,) = torch.autograd.grad(run(batch).square().sum(), batch, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), batch)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_s21_training_after_a_forward_without_autograd_is_exact(tiny: Pair, mode: Callable[[], Any]) -> None:
    with mode():
        tiny[1](images(seed=1))
        tiny[1].stage3[0](tiny[1].stage2(tiny[1].stage1(tiny[1].stem(images(seed=2)))))  # abandoned in mid-stage
    assert_gradients(tiny, tiny[1](images()).square().sum(), images())


def test_s21_frozen_early_blocks_may_run_without_autograd(tiny: Pair) -> None:
    attached = tiny[1]
    with torch.no_grad():
        features = attached.stage1[0](attached.stem(images()))
    output = attached.stage1[2](attached.stage1[1](features))
    output.sum().backward()
    assert attached.stage1[1].conv1.weight.grad is not None


def test_s24_bfloat16_autocast_drifts_little_over_18_blocks() -> None:
    model = nn.Sequential(*(BasicBlock(8, 8) for _ in range(18))).double().eval()
    attached = attach(model, "dia-lstm")
    value = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        exact = attached(value)
        attached.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = attached(value.float())
    assert ((rounded.double() - exact).norm() / exact.norm()).item() <= 1e-2


@pytest.mark.parametrize("name", ["dia-lstm", "se", "eca", "cbam", "sge", "srm", "spa"])
def test_s24_channels_last_features_stay_channels_last_through_the_network(name: str) -> None:
    attached = attach(TinyNet(), name).to(memory_format=torch.channels_last)
    seen = []
    for block in (attached.stage1[0], attached.stage3[3]):
        block.bn2.register_forward_hook(lambda *event: seen.append(event[2]))
        block.register_forward_hook(lambda *event: seen.append(event[2]))
    attached(images(dtype=torch.float32).contiguous(memory_format=torch.channels_last))
    assert len(seen) == 4
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in seen)


# S27: symbolic tracing


def test_s27_symbolic_tracing_through_attached_blocks_is_refused_with_the_fix(tiny: Pair) -> None:
    with pytest.raises(RuntimeError, match=r"torch.fx cannot trace .*leaf_modules"):
        torch.fx.symbolic_trace(tiny[1])
    with pytest.raises(RuntimeError, match=r"leaf_modules"):
        create_feature_extractor(tiny[1], ["stage3"])


@pytest.mark.parametrize("leaf", [BasicBlock, None], ids=["plain class", "attached class"])
def test_s27_symbolic_tracing_with_blocks_as_leaves_is_exact(tiny: Pair, leaf: type | None) -> None:
    attached = tiny[1]
    leaves = [leaf or type(attached.stage1[0])]
    extractor = create_feature_extractor(attached, ["head"], tracer_kwargs={"leaf_modules": leaves})
    output = extractor(images())["head"]
    assert own_parameters(extractor) == own_parameters(attached) > 0
    assert_gradients(tiny, output.square().sum(), images())


def test_jit_tracing_is_exact(tiny: Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(tiny[1], (images(),))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(images(5, seed=1)), tiny[1](images(5, seed=1)), rtol=0, atol=1e-12)


def test_distributed_checkpointing_reads_and_writes_the_weights(tiny: Pair) -> None:
    attached = tiny[1]
    weights = get_model_state_dict(attached)
    assert weights.keys() == attached.state_dict().keys()
    other = randomised(copy.deepcopy(attached), seed=5)
    set_model_state_dict(other, weights)
    assert torch.equal(other(images()), attached(images()))


class GuidedBlock(BasicBlock):  # type: ignore[misc]  # torchvision is typed in part only
    """A block that is called with something else first, as blocks with masks or time embeddings are."""

    def forward(self, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(features) * mask
        return output


class GuidedStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GuidedBlock(8, 8) for _ in range(3))
        self.register_buffer("mask", torch.ones(1))

    def forward(self, features: torch.Tensor, between: float = 1.0) -> torch.Tensor:
        for block in self.blocks:
            features = block(self.mask, features) * between
        return features


@pytest.mark.parametrize("between", [None, 1.0])
def test_a_tensor_that_all_blocks_are_given_first_carries_no_state(between: float | None) -> None:
    """Notes on it would lead a block to the state of an earlier block or of an earlier forward."""
    guided: Any = randomised(attach(GuidedStage().double().eval(), "dia-lstm"))
    guided.mask.fill_(1)
    plain = attach(nn.Sequential(*(BasicBlock(8, 8) for _ in range(3))).double().eval(), "dia-lstm")
    plain.load_state_dict({key.removeprefix("blocks."): v for key, v in guided.state_dict().items() if key != "mask"})
    first, second = (torch.randn(size, 8, 6, 6, dtype=torch.float64) for size in (2, 3))
    for features in (first, second, first):
        if between is None:  # the very tensor that the block before returned
            found = features
            for block in guided.blocks:
                found = block(guided.mask, found)
        else:
            found = guided(features, between)
        torch.testing.assert_close(found, plain(features), rtol=0, atol=1e-12)
    assert not vars(guided.mask)
