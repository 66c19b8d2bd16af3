"""How the state of a shared unit travels through a network.

A *tap* stands in the place of a site (the submodule that ends a residual branch), runs it and multiplies its output
by the attention map. A *chain* is the sequence of blocks whose taps share one unit. The class of every block of a
chain is replaced by a subclass whose ``forward`` opens a frame, runs the block's own ``forward`` and hands the state
on to the next block.

The state rides on the activation: a block notes it on the tensor it returns, and the next block reads it from the
tensor it is given. A non-reentrant activation checkpoint passes that very tensor again, so a block that is recomputed
in backward finds the state it was entered with, and two streams that go through a stage in turn cannot mix. Where
code stands between two blocks the chain itself, which is per thread, hands the state on; under ``torch.compile`` and
``torch.export`` it always does.

The one thing that cannot be told apart is two streams with code between the blocks of which one is given up in
mid-stage.

Module types instead of forward hooks, because compilers do not guard on hooks and norm conversion drops them.
"""

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn


class Handover(NamedTuple):
    """What a block hands on to the next block of its chain."""

    unit: nn.Module
    state: Any
    position: int  # of the block that hands it on; -1 before the first block has finished
    task: int  # backward pass in which it was made; -1 outside of one
    grad: bool  # whether autograd recorded how it was made


class Frame:
    """One call of a block that is under way."""

    def __init__(self, unit: nn.Module, state: Any) -> None:
        self.unit = unit
        self.state = state
        self.taps = 0


class Chain(threading.local):
    """The calls of one chain that are under way in this thread. Copies and unpickled instances start empty."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []  # blocks under way, innermost last
        self.handovers: list[Handover] = []  # one per forward of the chain that is under way

    def __deepcopy__(self, memo: dict[int, Any]) -> "Chain":
        return Chain()

    def __reduce__(self) -> tuple[type["Chain"], tuple[()]]:
        return Chain, ()


class Link(NamedTuple):
    """A block's place in its chain."""

    chain: Chain
    position: int
    last: bool
    taps: int  # taps inside the block; 0 for a block that only hands the state on


class _Notes(dict[Chain, Handover]):
    """Handovers noted on an activation. They stay behind when the tensor is copied or saved."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Notes":
        return _Notes()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # loads with weights_only=True


class AttachedBlock(nn.Module):
    """Mixed into the class of every block of a chain. The first block of the chain also holds the unit, as ``dia``."""

    plain_class: type[nn.Module]
    dia_link: Link
    dia: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        link = self.dia_link
        frame = _enter(self, link, _tensors((*args, *kwargs.values())))
        link.chain.frames.append(frame)
        finished = False
        try:
            output = super().forward(*args, **kwargs)
            finished = True
        finally:
            link.chain.frames.pop()
            if not finished:
                _drop_handover(link.chain)
        _leave(link, frame, output)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return new_attached_block, (self.plain_class,), *reduced[2:]


_attached_classes: dict[type[nn.Module], type[AttachedBlock]] = {}


def attached_class(plain_class: type[nn.Module]) -> type[AttachedBlock]:
    """Return the subclass of a block's class that carries attention: one per class, so that instances pickle."""
    if plain_class not in _attached_classes:
        names = {name: getattr(plain_class, name) for name in ("__module__", "__qualname__", "__doc__")}
        names["plain_class"] = plain_class
        _attached_classes[plain_class] = type(plain_class.__name__, (AttachedBlock, plain_class), names)
    return _attached_classes[plain_class]


def new_attached_block(plain_class: type[nn.Module]) -> AttachedBlock:
    """Make an empty instance, for ``copy`` and ``pickle`` to fill."""
    block_class = attached_class(plain_class)
    return block_class.__new__(block_class)


def _enter(block: AttachedBlock, link: Link, entries: list[Tensor]) -> Frame:
    """Open a frame with the unit and the state that the block before handed on."""
    chain, compiling = link.chain, torch.compiler.is_compiling()
    if link.position == 0:
        task = _backward_task()
        if not chain.frames:
            chain.handovers.clear()  # of forwards that were abandoned in mid-stage
        if task != -1:
            _forget_after_backward(chain.handovers, task)
        chain.handovers.append(Handover(block.dia, None, -1, task, torch.is_grad_enabled()))
        return Frame(block.dia, None)
    handover = _handed_on(chain) if compiling else _find_handover(link, entries)
    if handover is None or not 0 <= handover.position < link.position:
        raise RuntimeError(_no_state_message(link))
    wants_grad = not compiling and torch.is_grad_enabled() and any(entry.requires_grad for entry in entries)
    if wants_grad and not handover.grad:
        raise RuntimeError(
            "Gradients through the attention state would be lost: the block before was run without autograd, as "
            "reentrant activation checkpointing of single blocks does. Pass use_reentrant=False to "
            "torch.utils.checkpoint.checkpoint, or checkpoint whole stages."
        )
    return Frame(handover.unit, handover.state)


def _leave(link: Link, frame: Frame, output: Any) -> None:
    """Check that every tap of the block has run, and hand the state on."""
    chain = link.chain
    if frame.taps != link.taps:
        _drop_handover(chain)
        raise RuntimeError(
            f"{frame.taps} of {link.taps} sites with attention ran in one call of a block. Was a module of the block "
            "replaced after attach()? Call detach() first, replace it, then attach() again."
        )
    task = _backward_task()
    handover = Handover(frame.unit, frame.state, link.position, task, torch.is_grad_enabled())
    if chain.handovers and chain.handovers[-1].task == task:
        if link.last:
            chain.handovers.pop()
        else:
            chain.handovers[-1] = handover
    if not link.last and not torch.compiler.is_compiling():
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                _note(tensor, chain, handover)


def _drop_handover(chain: Chain) -> None:
    """Forget the forward in which a block has just raised."""
    if chain.handovers and chain.handovers[-1].task == _backward_task():
        chain.handovers.pop()


def _forget_after_backward(handovers: list[Handover], task: int) -> None:
    """A block that is recomputed alone hands its state on to nobody."""

    def forget() -> None:
        handovers[:] = [handover for handover in handovers if handover.task != task]

    torch.autograd.Variable._execution_engine.queue_callback(forget)  # as DDP does


def _handed_on(chain: Chain) -> Handover | None:
    """Return what the chain handed on last in this pass: forward and recomputation in backward must not mix."""
    if chain.handovers and chain.handovers[-1].task == _backward_task():
        return chain.handovers[-1]
    return None


def _backward_task() -> int:
    # Private, but what torch.utils.checkpoint itself asks to know whether it runs inside backward.
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _find_handover(link: Link, entries: list[Tensor]) -> Handover | None:
    """Return what the nearest block before noted on the tensors that this block is given, or handed to the chain."""
    notes = [tensor.__dict__["_dia_notes"].get(link.chain) for tensor in entries if "_dia_notes" in tensor.__dict__]
    earlier = [note for note in notes if note is not None and note.position < link.position]
    noted: Handover | None = max(earlier, key=lambda note: note.position, default=None)
    if noted is not None and noted.position == link.position - 1:
        return noted
    handed_on = _handed_on(link.chain)
    if handed_on is None or (noted is not None and handed_on.position != link.position - 1):
        return noted  # a block was skipped
    for tensor in entries:
        if tensor.grad_fn is not None:  # not a mask or a buffer, which the next forward is given too
            _note(tensor, link.chain, handed_on)  # so that a recomputation of this block finds it
            break
    return handed_on


def _note(tensor: Tensor, chain: Chain, handover: Handover) -> None:
    notes = tensor.__dict__.get("_dia_notes")
    if notes is None:
        notes = tensor._dia_notes = _Notes()  # type: ignore[attr-defined]  # rides on the activation
    notes[chain] = handover


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    if any(isinstance(value, torch.fx.Proxy) for value in values):
        raise RuntimeError(
            "torch.fx cannot trace through a block with shared attention. Make the block classes leaves, for "
            "example create_feature_extractor(..., tracer_kwargs={'leaf_modules': [type(model.layer1[0])]})."
        )
    return [value for value in values if isinstance(value, Tensor)]


def _no_state_message(link: Link) -> str:
    return (
        f"Block {link.position} of a stage with shared attention was called without the state of the blocks before it. "
        "Run the blocks of a stage in order, each once per forward. With activation checkpointing of single blocks "
        "use use_reentrant=False (and no save_on_cpu), or checkpoint whole stages."
    )
