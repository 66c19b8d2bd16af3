"""The state follows the residual stream, whatever else blocks take, skip, or checkpoint inside."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import attach

from .networks import (
    branch_and_shortcut,
    gradients,
    largest_difference,
    lstm_step,
    outstanding,
    randomised,
    unit_weights,
)


def chain(block: Callable[[], nn.Module], count: int = 3, **options: Any) -> Any:
    """Return blocks with attention that matters."""
    network = nn.Sequential(*(block() for _ in range(count))).double().eval()
    return randomised(attach(network, "dia-lstm", **options))


def features(seed: int = 0, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, size, size, generator=generator, dtype=torch.float64)


def by_hand(network: Any, stream: Tensor, run: tuple[int, ...], weights: Any = None) -> Tensor:
    """Run some of the blocks of a chain, threading the state by hand."""
    weights = weights or next(iter(unit_weights(network).values()))
    state = None
    for index in run:
        block = network[index]
        branch, shortcut = branch_and_shortcut(block, stream)
        attention_map, state = lstm_step(weights, branch, state)
        stream = (branch * attention_map + shortcut).relu()
    return stream


# Other tensors


class Conditioned(BasicBlock):  # type: ignore[misc]  # torchvision is typed in part only
    """A block whose first argument is something else."""

    def forward(self, context: Tensor, stream: Tensor) -> Tensor:
        output: Tensor = super().forward(stream + context)
        return output


class Refiner(nn.Module):
    """Runs one set of blocks on one context."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Conditioned(8, 8) for _ in range(3))

    def forward(self, context: Tensor, stream: Tensor, between: float = 0.5) -> Tensor:
        for block in self.blocks:
            stream = block(context, stream) * between
        return stream


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no grad"])
def test_a_context_that_all_blocks_are_given_carries_no_state(grad: bool) -> None:
    network = randomised(attach(Refiner().double().eval(), "dia-lstm"))
    with torch.set_grad_enabled(grad):
        context = nn.Conv2d(8, 8, 1).double()(features(5))  # with a gradient function
        expected = copy.deepcopy(network)(context.clone(), features(2))
        for seed in (1, 2, 1):
            network(context, features(seed))
        assert torch.equal(network(context, features(2)), expected)


def test_gradients_with_a_shared_context_and_checkpointed_blocks_are_exact() -> None:
    """Both forwards leave their state next to the same context before one backward."""
    network: Any = randomised(attach(Refiner().double().eval(), "dia-lstm"))
    context = features(5).requires_grad_()

    def run(checkpointed: bool) -> dict[str, Tensor]:
        own = copy.deepcopy(network)
        for block in own.blocks if checkpointed else ():
            forward = block.forward
            block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        torch.autograd.backward(sum(own(context, features(seed)).square().sum() for seed in (1, 2)))
        return gradients(own)

    assert largest_difference(run(checkpointed=True), run(checkpointed=False)) <= 1e-12


class Crossed(BasicBlock):  # type: ignore[misc]
    """A block of one stream that looks at another one."""

    def forward(self, other: Tensor, stream: Tensor) -> Tensor:
        output: Tensor = super().forward(stream + 0.1 * other)
        return output


class NamedCrossed(BasicBlock):  # type: ignore[misc]
    """Such a block that names the stream like its known base class."""

    def forward(self, other: Tensor, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x + 0.1 * other)
        return output


class TwoStreams(nn.Module):
    """Two streams through one set of blocks that look at each other, with or without code in between."""

    def __init__(self, block: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(8, 8) for _ in range(3))

    def forward(self, u: Tensor, v: Tensor, between: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            u, v = block(v, between(u)), block(u, between(v))
        return u, v


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no grad"])
def test_streams_that_look_at_each_other_are_refused_where_it_is_not_known_which_is_which(grad: bool) -> None:
    network = attach(TwoStreams(Crossed).double().eval(), "dia-lstm")
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match="2 tensors of features, and it is not known which"),
    ):
        network(features(1), features(2), lambda stream: stream * 0.5)
    assert outstanding() == 0


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no grad"])
def test_streams_that_look_at_each_other_are_exact_where_their_name_is_known(grad: bool) -> None:
    network: Any = randomised(attach(TwoStreams(NamedCrossed).double().eval(), "dia-lstm"))
    weights = unit_weights(network)["blocks"]
    u, v = features(1), features(2)
    with torch.set_grad_enabled(grad):
        found = network(u, v, nn.Identity())
        states: list[Any] = [None, None]
        for block in network.blocks:
            streams = []
            for index, (stream, other) in enumerate(((u, v), (v, u))):
                given = stream + 0.1 * other
                branch, shortcut = branch_and_shortcut(block, given)
                attention_map, states[index] = lstm_step(weights, branch, states[index])
                streams.append((branch * attention_map + shortcut).relu())
            u, v = streams
    torch.testing.assert_close(found, (u, v), rtol=0, atol=1e-12)


class ListBlock(BasicBlock):  # type: ignore[misc]
    """A block that takes and returns a list."""

    def forward(self, stream: list[Tensor]) -> list[Tensor]:
        return [super().forward(stream[0])]


def test_tensors_in_lists_carry_the_state_through_checkpoints_and_backward_hooks() -> None:
    network = chain(lambda: ListBlock(8, 8))
    for module in network.modules():
        module.inplace = False  # as torch asks where there are such hooks
    network[2].register_full_backward_hook(lambda *_: None)
    found = []
    for checkpointed in (False, True):
        own, stream = copy.deepcopy(network), [features().requires_grad_()]
        for block in own:
            stream = checkpoint(block, stream, use_reentrant=False) if checkpointed else block(stream)
        stream[0].square().sum().backward()  # type: ignore[no-untyped-call]
        found.append(gradients(own))
    assert largest_difference(*found) <= 1e-12


# Blocks that are skipped


class Skipping(nn.Module):
    """Stochastic depth by not calling blocks, as layer drop does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BasicBlock(8, 8) for _ in range(4))

    def forward(self, stream: Tensor, keep: tuple[int, ...], between: float | None = None) -> Tensor:
        for index in keep:
            stream = self.blocks[index](stream if between is None else stream * between)
        return stream


@pytest.mark.parametrize("between", [None, 1.0], ids=["same tensor", "code between"])
@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no grad"])
def test_skipped_blocks_hand_the_state_on_unchanged_and_the_first_cannot_be_skipped(
    grad: bool, between: float | None
) -> None:
    network: Any = randomised(attach(Skipping().double().eval(), "dia-lstm"))
    weights = unit_weights(network)["blocks"]
    with torch.set_grad_enabled(grad):
        for keep in ((0, 1, 2, 3), (0, 2, 3), (0, 1), (0, 3), (0,)):
            expected = by_hand(network.blocks, features(1), keep, weights)
            torch.testing.assert_close(network(features(1), keep, between), expected, rtol=0, atol=1e-12)
            with pytest.raises(
                RuntimeError, match=r"The first block of a stage .* holds the attention and cannot be skipped"
            ):
                network(features(2), (1, 2, 3), between)
    assert outstanding() == 0


class Early(BasicBlock):  # type: ignore[misc]
    """A block that may return its input, as with stochastic depth inside blocks."""

    off = False

    def forward(self, stream: Tensor) -> Tensor:
        output: Tensor = stream if self.off else super().forward(stream)
        return output


@pytest.mark.parametrize("off", range(4))
def test_a_block_that_returns_what_it_was_given_hands_the_state_on_unchanged(off: int) -> None:
    network = chain(lambda: Early(8, 8), 4)
    network[off].off = True
    expected = by_hand(network, features(), tuple(index for index in range(4) if index != off))
    torch.testing.assert_close(network(features()), expected, rtol=0, atol=1e-12)


class EarlyCopy(Early):
    """A block that returns before its branch ends, with something new."""

    def forward(self, stream: Tensor) -> Tensor:
        output: Tensor = stream * 2 if self.off else super().forward(stream)
        return output


def test_a_block_that_leaves_its_site_out_otherwise_is_refused_with_the_site() -> None:
    network = chain(lambda: EarlyCopy(8, 8))
    network[1].off = True
    with pytest.raises(RuntimeError, match=r"one call of EarlyCopy .*'bn2' .BatchNorm2d. 0 times.*return early"):
        network(features())
    assert outstanding() == 0


# Checkpoints and precision inside


class Inside(nn.Module):
    """Checkpoints its own inside, as OpenMMLab's blocks do with `with_cp`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def inner(self, stream: Tensor) -> Tensor:
        output: Tensor = stream + self.norm(self.conv(stream))
        return output

    def forward(self, stream: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.inner, stream, use_reentrant=False)
        return output.relu()


def test_a_checkpoint_inside_of_a_block_is_refused_in_backward_with_the_cause() -> None:
    network = chain(Inside, sites="*.norm")
    loss = network(features().requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="the block checkpoints part of itself"):
        loss.backward()


class Layer(BasicBlock):  # type: ignore[misc]
    """Checkpoints itself when called, as transformers layers do."""

    reentrant: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reentrant is None:
            return super().__call__(*args, **kwargs)
        return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_checkpoint_their_own_call_are_exact_or_refused(reentrant: bool) -> None:
    network = chain(lambda: Layer(8, 8))

    def run(reentrant: bool | None) -> dict[str, Tensor]:
        own = copy.deepcopy(network)
        for block in own:
            block.reentrant = reentrant
        streams = [features(seed).requires_grad_() for seed in (1, 2)]
        torch.autograd.backward(sum(own(stream).square().sum() for stream in streams))
        return gradients(own)

    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            run(reentrant)
    else:
        assert largest_difference(run(reentrant), run(None)) == 0


class Recomputing(torch.autograd.Function):
    """A third-party checkpoint that copies its inputs."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, block: nn.Module) -> Tensor:
        ctx.stream, ctx.block = stream, block
        output: Tensor = block(stream)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.enable_grad():
            copied = ctx.stream.detach().clone().requires_grad_()
            ctx.block(copied).backward(grads[0])
        return copied.grad, None


def test_a_reentrant_and_a_copying_checkpoint_get_different_advice() -> None:
    network = chain(lambda: BasicBlock(8, 8))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(network[1], network[0](features().requires_grad_()), use_reentrant=True).sum().backward()
    stream = network[1](network[0](features().requires_grad_()))
    loss = Recomputing.apply(stream, network[2]).sum()
    with pytest.raises(RuntimeError, match="a copy of the one in the forward") as error:
        loss.backward()
    assert "use_reentrant" not in str(error.value)


@pytest.mark.parametrize("where", range(3))
def test_one_block_outside_of_autocast_takes_the_state_in_its_own_precision(where: int) -> None:
    network = chain(lambda: BasicBlock(8, 8)).float()
    stream = features().float()
    expected = network(stream)
    with torch.autocast("cpu", torch.bfloat16):
        for index, block in enumerate(network):
            with torch.autocast("cpu", torch.bfloat16, enabled=index != where):
                stream = block(stream.float() if index == where else stream)
    assert ((stream - expected).norm() / expected.norm()).item() < 3e-2


class Pipeline(nn.Module):
    """The last block is in another precision, as parts on other devices are elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(BasicBlock(8, 8) for _ in range(3))

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks:
            stream = block(stream.to(block.conv1.weight.dtype))
        return stream


def test_the_state_moves_to_the_precision_of_the_next_block() -> None:
    class Sum(nn.Module):
        """A unit whose state is a dictionary of sums."""

        def forward(self, features: Tensor, state: dict[str, Any] | None) -> tuple[Tensor, dict[str, Any]]:
            mean = features.mean((2, 3), keepdim=True)
            total = mean if state is None else state["sums"][0] + mean
            assert total.dtype == features.dtype
            return total.sigmoid(), {"sums": [total], "blocks": 1 if state is None else state["blocks"] + 1}

    network: Any = attach(Pipeline().eval(), lambda channels: Sum())
    expected = network(features().float())
    network.blocks[2].double()
    torch.testing.assert_close(network(features().float()).float(), expected, rtol=0, atol=1e-5)


class LeftAndTaken(nn.Module):
    """One stream leaves after the first block, another one enters after it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BasicBlock(8, 8) for _ in range(2))

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        u = self.blocks[0](u * 1.0)
        return u, self.blocks[1](v * 1.0)


def test_a_stream_does_not_take_what_another_one_has_left_in_the_same_forward() -> None:
    network = attach(LeftAndTaken().double().eval(), "dia-lstm")
    with pytest.raises(RuntimeError, match="without the state of the blocks before it"):
        network(features(1).requires_grad_(), features(2).requires_grad_())


class Passing(BasicBlock):  # type: ignore[misc]
    """A block that returns its other argument along with the stream."""

    def forward(self, stream: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(stream + bias), bias


def test_a_buffer_that_blocks_pass_through_keeps_nothing() -> None:
    network: Any = attach(nn.ModuleList(Passing(8, 8) for _ in range(2)).double().eval(), "dia-lstm", sites="*.bn2")
    for block in network:
        block.dia_links[0].stream = 0  # as a rule or an example would state
    bias, stream = features(3), features(1)
    for block in network:
        stream, _ = block(stream, bias)
    assert not vars(bias)


class Contextual(BasicBlock):  # type: ignore[misc]
    """A block that takes and returns the stream and a context in one tuple."""

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        stream, context = inputs
        return super().forward(stream + context), context


class ContextualStage(nn.Module):
    """Runs some of its blocks on a stream and a context."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Contextual(8, 8) for _ in range(3))
        self.checkpointed = False

    def forward(self, stream: Tensor, context: Tensor, keep: tuple[int, ...] = (0, 1, 2), scale: float = 1.0) -> Tensor:
        for index in keep:
            inputs = (stream * scale, context) if scale != 1 else (stream, context)
            block = self.blocks[index]
            stream, context = checkpoint(block, inputs, use_reentrant=False) if self.checkpointed else block(inputs)
        return stream


@pytest.mark.parametrize("scale", [1.0, 0.5], ids=["same tensor", "code between"])
def test_a_context_in_one_tuple_with_the_stream_carries_no_state(scale: float) -> None:
    network: Any = randomised(attach(ContextualStage().double().eval(), "dia-lstm"))
    context = nn.Conv2d(8, 8, 1).double()(features(5))

    def run(checkpointed: bool, retain: bool) -> dict[str, Tensor]:
        own = copy.deepcopy(network)
        own.checkpointed = checkpointed
        losses = [own(features(seed), context, scale=scale).square().sum() for seed in (1, 2)]
        torch.autograd.backward(sum(losses), retain_graph=True)
        return gradients(own)

    assert largest_difference(run(True, True), run(False, True)) <= 1e-12
    network(features(1), context, scale=scale)
    with pytest.raises(RuntimeError):
        network(features(2), context, (1, 2), scale)  # the first block is skipped
    blocks = network.blocks
    expected = [blocks[1](blocks[0]((features(seed), context)))[0] for seed in (1, 2)]
    (u, _), (v, _) = (blocks[0]((features(seed), context)) for seed in (1, 2))
    assert torch.equal(blocks[1]((u, context))[0], expected[0])
    assert torch.equal(blocks[1]((v, context))[0], expected[1])


def test_a_state_does_not_go_to_other_samples() -> None:
    class Leaving(nn.Module):
        """Samples leave early, between two blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(BasicBlock(8, 8) for _ in range(2))

        def forward(self, stream: Tensor) -> Tensor:
            output: Tensor = self.blocks[1](self.blocks[0](stream)[:1])
            return output

    with pytest.raises(RuntimeError, match="2 samples became 1"):
        attach(Leaving().double().eval(), "dia-lstm")(features())
    assert attach(Leaving().double().eval(), "se")(features()).shape == (1, 8, 6, 6)  # without a state nothing can mix


def test_a_tensor_that_was_written_since_carries_no_state() -> None:
    network = chain(lambda: BasicBlock(8, 8))
    with torch.no_grad():
        buffer = network[0](features(1))
        buffer.copy_(features(2))
        with pytest.raises(RuntimeError, match="without the state"):
            network[1](buffer)


def test_a_first_block_that_returns_its_input_leaves_nothing_on_it() -> None:
    network = chain(lambda: Early(8, 8))
    network[0].off = True
    given = features()
    network(given)
    with pytest.raises(RuntimeError, match="without the state"):
        network[1](given)


def test_frozen_lower_blocks_may_run_without_autograd_before_a_prompt_that_learns() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(BasicBlock(8, 8) for _ in range(2))
            self.prompt = nn.Parameter(torch.ones(1, 8, 1, 1))

        def forward(self, stream: Tensor) -> Tensor:
            with torch.no_grad():
                stream = self.blocks[0](stream)
            output: Tensor = self.blocks[1](stream + self.prompt)
            return output

    network: Any = randomised(attach(Prompted().double().eval(), "dia-lstm"))
    network(features()).sum().backward()
    assert network.prompt.grad.abs().max() > 0
    assert network.blocks[0].conv1.weight.grad is None


class TwoSites(nn.Module):
    """Calls one of its two norms twice and the other one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, stream: Tensor) -> Tensor:
        output: Tensor = stream + self.first(self.first(stream))
        return output


def test_a_site_that_runs_twice_does_not_stand_for_one_that_does_not_run() -> None:
    network = attach(nn.Sequential(TwoSites()).double(), "se", sites=["*.first", "*.second"])
    with pytest.raises(RuntimeError, match=r"'first' .* 2 times, 'second' .* 0 times"):
        network(features())


class Parent(nn.Module):
    """Runs the blocks of its child itself."""

    def __init__(self) -> None:
        super().__init__()
        self.child: Any = Refiner()
        self.child.blocks = nn.ModuleList(BasicBlock(8, 8) for _ in range(3))

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.child.blocks:
            stream = block(stream * 0.5)
        return stream


def test_a_parent_may_run_the_blocks_of_its_child_without_autograd() -> None:
    network = randomised(attach(Parent().double().eval(), "dia-lstm"))
    expected = network(features())
    with torch.no_grad():
        assert torch.equal(network(features()), expected)


@pytest.mark.parametrize("last", [torch.float32, torch.float64])
def test_the_last_block_in_another_precision_uses_the_unit_in_its_own(last: torch.dtype) -> None:
    network: Any = randomised(attach(Pipeline().eval(), "dia-lstm"))
    expected = network(features().float())
    network.blocks[2].to(last)
    found = network(features().float())
    assert found.dtype == last
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)


@dataclass
class Carried:
    """What blocks pass on, including the stream."""

    stream: Tensor
    step: int


class Carrying(BasicBlock):  # type: ignore[misc]
    """A block that takes and returns a dataclass."""

    def forward(self, carried: Carried) -> Carried:
        return Carried(super().forward(carried.stream), carried.step + 1)


def test_a_stream_in_a_dataclass_carries_the_state() -> None:
    network = chain(lambda: Carrying(8, 8))
    expected = by_hand(network, features(), (0, 1, 2))
    torch.testing.assert_close(network(Carried(features(), 0)).stream, expected, rtol=0, atol=1e-12)
    output = Carried(features(), 0)
    for block in network:
        output = checkpoint(block, output, use_reentrant=False)
    torch.testing.assert_close(output.stream, expected, rtol=0, atol=1e-12)


class Stepping(nn.Module):
    """Also runs its blocks in methods of other names, as Lightning modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BasicBlock(8, 8) for _ in range(3))

    def forward(self, stream: Tensor) -> Tensor:
        for block in self.blocks:
            stream = block(stream * 0.5)
        return stream

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for block in self.blocks:
            batch = block(batch * 0.5)
        return batch


def test_methods_that_are_called_by_their_names_run_blocks_without_autograd() -> None:
    network: Any = randomised(attach(Stepping().double().eval(), "dia-lstm"))
    expected = network(features())
    with torch.no_grad():
        assert torch.equal(network.forward(features()), expected)
        assert torch.equal(network.validation_step(features(), 0), expected)
    assert list(inspect.signature(network.forward).parameters) == ["stream"]
    assert list(inspect.signature(network.validation_step).parameters) == ["batch", "batch_idx"]
    assert outstanding() == 0


def test_a_module_of_lightning_that_runs_its_blocks_itself_trains_and_validates() -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(BasicBlock(8, 8) for _ in range(3))
            self.seen: list[Tensor] = []
            attach(self, "dia-lstm")

        def features_of(self, stream: Tensor) -> Tensor:
            for block in self.blocks:
                stream = block(stream * 0.5)
            return stream

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.features_of(batch[0]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(self.features_of(batch[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(TensorDataset(features().float()), batch_size=2)
    module = Module()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data, data)
    assert module.seen[-1].isfinite().all()
