"""The state of attention stays with its forward: earlier ones, batch mates, errors, copies, odd orders of blocks."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import attach

from .networks import (
    backward,
    images,
    outstanding,
    randomised,
    threaded,
    unit_weights,
)
from .running import Pair, by_block, checkpointed, directly

# batch mates and earlier forwards


def test_a_sample_alone_gives_what_it_gives_in_a_batch(tiny: Pair) -> None:
    batch = images(4)
    torch.testing.assert_close(tiny[1](batch[2:3]), tiny[1](batch)[2:3], rtol=0, atol=1e-6)


def test_other_batch_mates_change_nothing(resnet18_pair: tuple[nn.Module, nn.Module]) -> None:
    batch, attached = images(4, 64, dtype=torch.float32), resnet18_pair[1].float()
    with torch.no_grad():
        expected = attached(batch)
        batch[1:] = 50 * torch.randn_like(batch[1:])
        assert torch.equal(attached(batch)[:1], expected[:1])
        batch[1:] = torch.nan
        assert torch.equal(attached(batch)[:1], expected[:1])


def test_a_previous_forward_changes_nothing(tiny: Pair) -> None:
    expected = tiny[1](images())
    for batch in (images(5, seed=1), images(1, seed=2), images(2, 9, seed=3)):
        tiny[1](batch)
        assert torch.equal(tiny[1](images()), expected)


@pytest.mark.parametrize(("batch", "size"), [(1, 12), (7, 12), (2, 8), (3, 17), (2, 1)])
def test_other_batch_sizes_and_resolutions_are_exact(tiny: Pair, batch: int, size: int) -> None:
    plain, attached = tiny
    attached(images())
    value = images(batch, size, seed=4)
    torch.testing.assert_close(attached(value), threaded(plain, unit_weights(attached), value), rtol=0, atol=1e-12)


def test_kernels_may_differ_between_batch_sizes_but_hardly(resnet18_pair: tuple[nn.Module, nn.Module]) -> None:
    attached, batch = resnet18_pair[1].float(), images(8, 64, dtype=torch.float32)
    with torch.no_grad():
        together, alone = attached(batch)[:1], attached(batch[:1])
    assert ((together - alone).abs().max() / together.abs().max()).item() <= 1e-5


# nothing stays


class Interruption(BaseException):
    """Like KeyboardInterrupt, not an Exception."""


@pytest.mark.parametrize("error", [RuntimeError, Interruption])
@pytest.mark.parametrize("block", range(4))
def test_an_exception_in_mid_stage_leaves_nothing_behind(tiny: Pair, block: int, error: type[BaseException]) -> None:
    attached = tiny[1]
    expected = attached(images())
    conv = attached.stage3[block].conv2
    weight = weakref.ref(conv.weight)

    def fail(value: Tensor) -> Tensor:
        raise error("on purpose")

    conv.forward = fail
    with pytest.raises(error, match="on purpose"):
        attached(images(3, seed=1))
    assert outstanding() == 0
    assert weight() is not None
    del conv.forward
    assert torch.equal(attached(images()), expected)


def live_tensors() -> int:
    gc.collect()
    gc.collect()  # what only autograd held before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def test_nothing_is_held_after_a_forward(tiny: Pair) -> None:
    attached = tiny[1]
    attached(images())
    assert outstanding() == 0
    before = live_tensors()
    attached(images())
    assert live_tensors() == before


def test_forwards_without_backward_leak_nothing_even_without_the_garbage_collector(tiny: Pair) -> None:
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
    assert outstanding() == 0


def test_activations_of_a_stage_that_is_over_carry_no_state(tiny: Pair) -> None:
    features = tiny[1].stage1(tiny[1].stem(images()))
    assert not [value for value in vars(features).values() if value]


@pytest.mark.parametrize("early_stop", [True, False])
def test_nothing_is_held_after_a_backward_that_recomputed_blocks(tiny: Pair, early_stop: bool) -> None:
    with set_checkpoint_early_stop(early_stop):
        backward(by_block(tiny[1], images(), checkpointed(reentrant=False)).sum())
    assert outstanding() == 0


def test_forwards_abandoned_in_mid_stage_are_not_held(tiny: Pair) -> None:
    plain, attached = tiny
    features = attached.stem(images()).detach()
    states = []
    for _ in range(200):
        output = attached.stage1[1](attached.stage1[0](features))
        states.append(weakref.ref(output))
        del output
    assert outstanding() <= 1
    assert sum(state() is not None for state in states) <= 1
    torch.testing.assert_close(
        attached(images()), threaded(plain, unit_weights(attached), images()), rtol=0, atol=1e-12
    )
    assert outstanding() == 0


# copies


def test_a_deep_copy_after_a_training_forward_uses_its_own_unit(tiny: Pair) -> None:
    attached = tiny[1]
    output = attached(images())
    other = copy.deepcopy(attached)
    assert torch.equal(other(images()), output)
    with torch.no_grad():
        other.stage1[0].dia.input_expand.weight.zero_()
    assert not torch.allclose(other(images()), output)
    assert torch.equal(attached(images()), output)


def test_a_deep_copy_in_mid_forward_starts_empty(tiny: Pair) -> None:
    attached = tiny[1]
    features = attached.stage3[0](attached.stage2(attached.stage1(attached.stem(images()))))
    other = copy.deepcopy(attached)
    assert outstanding() == 0
    with pytest.raises(RuntimeError, match="Block 1 of a stage"):
        other.stage3[1](features)


def test_an_averaged_copy_follows_the_average_and_not_the_original(tiny: Pair) -> None:
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
def test_a_pickled_network_works(tiny: Pair, protocol: int) -> None:
    attached = tiny[1]
    attached(images())
    other = pickle.loads(pickle.dumps(attached, protocol=protocol))
    assert torch.equal(other(images()), attached(images()))
    assert type(other.stage1[0]) is type(attached.stage1[0])


def test_torch_saves_and_loads_a_whole_network(tiny: Pair) -> None:
    buffer = io.BytesIO()
    torch.save(tiny[1], buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(images()), tiny[1](images()))


def test_a_shallow_copy_of_a_block_stays_attached(tiny: Pair) -> None:
    block = copy.copy(tiny[1].stage2[0])
    features = tiny[1].stage1(tiny[1].stem(images()))
    assert torch.equal(block(features), tiny[1].stage2[0](features))


def test_a_saved_activation_leaves_the_state_behind_and_loads_with_weights_only(tiny: Pair) -> None:
    features = tiny[1].stage1[0](tiny[1].stem(images()))
    buffer = io.BytesIO()
    torch.save(features, buffer)
    assert buffer.tell() < 2 * features.numel() * 8 + 4000
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded, features)
    assert not any(vars(loaded).values())


def test_a_deep_copied_activation_leaves_the_state_behind(tiny: Pair) -> None:
    with torch.no_grad():
        features = tiny[1].stage1[0](tiny[1].stem(images()))
    assert any(vars(features).values())
    assert not any(vars(copy.deepcopy(features)).values())


# stages run in other ways


def test_a_stage_iterated_from_outside_is_exact(tiny: Pair) -> None:
    assert torch.equal(by_block(tiny[1], images(), directly), tiny[1](images()))


def test_a_stage_iterated_from_outside_with_code_between_is_exact(tiny: Pair) -> None:
    output = by_block(tiny[1], images(), lambda block, features: block(features * 1))
    torch.testing.assert_close(output, tiny[1](images()), rtol=0, atol=0)


def test_a_stage_called_by_keyword_is_exact(tiny: Pair) -> None:
    output = by_block(tiny[1], images(), lambda block, features: block(x=features))
    assert torch.equal(output, tiny[1](images()))


def test_a_truncated_stage_does_not_change_the_next_forward(tiny: Pair) -> None:
    attached = tiny[1]
    expected = attached(images())
    features = attached.stem(images(3, seed=1))
    for stop in (1, 2):
        truncated: Tensor = attached.stage1[:stop](features)
        assert truncated.shape == features.shape
        assert torch.equal(attached(images()), expected)


def test_a_block_of_the_middle_called_alone_is_refused(tiny: Pair) -> None:
    attached = tiny[1]
    features = attached.stem(images())
    for index in (1, 2):
        with pytest.raises(RuntimeError, match=f"Block {index} of a stage with shared attention was called without"):
            attached.stage1[index](features)
    attached(images())
    with pytest.raises(RuntimeError, match="Block 1 of a stage"):
        attached.stage1[1](features)
    assert outstanding() == 0


def test_the_first_block_alone_is_exact(tiny: Pair) -> None:
    plain, attached = tiny
    one_block = nn.Sequential(plain.stage1[0])
    value = attached.stem(images())
    reference = attach(copy.deepcopy(one_block), "dia-lstm")
    weights = {key: value for key, value in attached.stage1[:1].state_dict().items() if key.startswith("0.")}
    reference.load_state_dict(weights)
    assert torch.equal(attached.stage1[0](value), reference(value))


@pytest.mark.parametrize("skipped", [1, 2])
def test_a_skipped_block_of_the_middle_hands_the_state_on_unchanged(tiny: Pair, skipped: int) -> None:
    plain, attached = tiny
    chosen = attached.stage3[skipped]
    output = by_block(attached, images(), lambda block, value: value if block is chosen else block(value))
    shortened = copy.deepcopy(plain)
    del shortened.stage3[skipped]
    expected = threaded(shortened, unit_weights(attached), images())
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_skipping_the_first_block_is_refused(tiny: Pair) -> None:
    with pytest.raises(RuntimeError, match="Block 1 of a stage"):
        tiny[1].stage1[1:](tiny[1].stem(images()))


def test_the_same_block_twice_is_refused(tiny: Pair) -> None:
    features = tiny[1].stage1[0](tiny[1].stem(images()))
    features = tiny[1].stage1[1](features)
    with pytest.raises(RuntimeError, match="in order, each on what the one before returned"):
        tiny[1].stage1[1](features)


def test_a_site_called_by_itself_is_the_plain_layer(tiny: Pair) -> None:
    features = tiny[1].stem(images())
    assert torch.equal(tiny[1].stage1[1].bn2(features), tiny[0].stage1[1].bn2(features))


class Inlined(nn.Sequential):
    """Runs the layers of its blocks without the blocks, as fused implementations do."""

    def forward(self, features: Tensor) -> Tensor:
        for block in self:
            assert isinstance(block, BasicBlock)
            features = features + block.bn2(block.conv2(block.bn1(block.conv1(features)).relu()))
        return features


@pytest.mark.parametrize("share", ["stage", "block"])
def test_a_network_that_runs_a_site_outside_of_its_block_is_refused(share: Any) -> None:
    network = attach(Inlined(BasicBlock(8, 8), BasicBlock(8, 8)), "dia-lstm", share=share)
    with pytest.raises(RuntimeError, match="called outside its block"):
        network(torch.randn(2, 8, 6, 6))


class GuidedBlock(BasicBlock):  # type: ignore[misc]  # torchvision is typed in part only
    """A block whose first argument is something else, as in blocks with masks or time embeddings."""

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
        if between is None:  # the very tensor that the previous block returned
            found = features
            for block in guided.blocks:
                found = block(guided.mask, found)
        else:
            found = guided(features, between)
        torch.testing.assert_close(found, plain(features), rtol=0, atol=1e-12)
    assert not vars(guided.mask)
