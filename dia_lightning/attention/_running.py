"""What runs: the state of a shared unit on its way from block to block.

Words: a *unit* makes attention maps. A *site* is the layer that ends a residual branch; its place in the block is a
*slot*. A *block* adds the branch to the shortcut, the *stream*. A *chain* is the blocks that share a unit; their
*owner* is a module whose forward runs them. What a block leaves for the next one is a *handover*. A forward of a chain:

1. The owner is called. It opens a *scope*, in which its chains may leave handovers.
2. The first block is called. It opens a *frame* with the unit, which it holds, and without a state.
3. The block's own forward runs and calls the site. The unit turns the site's output into a map and steps the state.
4. The block returns. The frame is closed: every site must have run once. The handover, which is unit and state, is
   noted on the tensor that the block returns and on the operation that made it, and left in the scope.
5. The next block is called. It takes the handover that is noted on its stream; if code has made another tensor of
   that, the one in the scope or on the operations that the stream was made of. Then as in 2 to 4.
6. The last block leaves nothing. The owner returns and closes the scope with whatever is still in it.

A block that is recomputed alone in backward finds the note on the tensor that it was given in the forward. Nothing is
kept in modules, so threads, nested and abandoned forwards cannot mix, and no number tells equal blocks apart, so that
compilers need one graph for them.
"""

import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from dia_lightning.attention._links import Chain, Link, tensors_in

#: How many operations back a handover is looked for.
OPERATIONS = 2000


class Handover:
    """What a block hands on to the next one of its chain."""

    def __init__(self, unit: nn.Module, state: Any, link: Link, grad: bool) -> None:
        self.unit = unit
        self.state = state
        self.link = link
        self.grad = grad  # whether autograd recorded how the state was made
        self.in_graph = False  # whether it is noted on an operation


class Scope:
    """A call of an owner that is under way."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.chains = chains
        self.task = backward_task()
        self.outer = RUNNING.scope
        self.handovers: list[Handover] = []

    def __enter__(self) -> None:
        RUNNING.scope = self

    def __exit__(self, *error: object) -> None:
        RUNNING.scope = self.outer


class Frame:
    """A call of a block that is under way."""

    def __init__(
        self, block: nn.Module, link: Link, sites: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.block = block
        self.link = link
        self.sites = sites  # in the slots of the link
        self.arguments = args, kwargs
        self.received = None if link.before is None else _received(link, args, kwargs)
        self.unit: nn.Module = block.dia if self.received is None else self.received.unit  # type: ignore[assignment]
        self.state = None if self.received is None else self.received.state
        self.grad = torch.is_grad_enabled()
        self.ran = 0  # sites
        self.begun = False  # whether the block's own forward was entered
        self.attends = False  # whether the unit is being called for a site
        self.outer = RUNNING.frame

    def __enter__(self) -> "Frame":
        RUNNING.frame = self
        return self

    def __exit__(self, error: object, *_: object) -> None:
        RUNNING.frame = self.outer
        if error is not None:
            self._leave_in_scope(None)

    def hand_on(self, output: Any) -> None:
        """Check that every site has run, and leave the state for the next block."""
        link = self.link
        if self.ran != len(link.slots) and not self._returned_its_stream(output):
            self._leave_in_scope(None)
            raise RuntimeError(_sites_did_not_run(self))
        if link.last:
            self._leave_in_scope(None)
            return
        handover = Handover(self.unit, self.state, link, self.grad)
        self._leave_in_scope(handover)
        beside = [] if isinstance(output, Tensor) or link.stream is None else self._given_beside_the_stream()
        for tensor in tensors_in(output):
            if any(tensor is other for other in beside):
                continue  # passed through, and may outlive the forward
            _notes(tensor).leave(handover)
            if not torch.compiler.is_compiling() and tensor.grad_fn is not None:
                tensor.grad_fn.metadata[link.chain] = handover  # type: ignore[index]  # typed as a method
                handover.in_graph = True

    def _given_beside_the_stream(self) -> list[Tensor]:
        stream, _ = self.link.stream_in(*self.arguments)
        return [given for given in tensors_in(self.arguments) if all(given is not tensor for tensor in stream)]

    def _returned_its_stream(self, output: Any) -> bool:
        """Tell whether the block left its branch out, as stochastic depth may do; it hands on what it was given."""
        stream, _ = self.link.stream_in(*self.arguments)
        returned = tensors_in(output)
        return self.ran == 0 and len(stream) == 1 and len(returned) > 0 and returned[0] is stream[0]

    def _leave_in_scope(self, handover: Handover | None) -> None:
        scope = _scope(self.link.chain)
        if scope is not None:
            left = [other for other in scope.handovers if other is not self.received]
            scope.handovers = left if handover is None else [*left, handover]


class Running(threading.local):
    """Innermost frame and scope of a thread."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.scope: Scope | None = None


RUNNING = Running()


class _Notes:
    """What is noted on a tensor. It stays behind when the tensor is copied or saved."""

    def __init__(self) -> None:
        self.left: list[Handover] = []  # by the block that returned the tensor, one per chain
        self.given: list[tuple[Link, Handover | None]] = []  # to a block with the tensor; None if not always one

    def leave(self, handover: Handover) -> None:
        self.left = [*(other for other in self.left if other.link.chain is not handover.link.chain), handover]

    def give(self, link: Link, handover: Handover) -> None:
        known = [other for to, other in self.given if to is link]
        others = [(to, other) for to, other in self.given if to is not link]
        self.given = [*others, (link, handover if not known or known[0] is handover else None)]

    def find(self, link: Link, certain: bool) -> Handover | None:
        for to, handover in self.given if _is_recomputed() else ():
            if to is link:
                return handover
        for handover in self.left if certain or not _is_recomputed() else ():
            if handover.link.chain is link.chain:
                return handover
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # loads with weights_only=True


def _notes(tensor: Tensor) -> _Notes:
    notes: _Notes | None = getattr(tensor, "_dia_notes", None)
    if not isinstance(notes, _Notes):  # none yet, or a loaded tensor's
        notes = tensor._dia_notes = _Notes()  # type: ignore[attr-defined]  # rides on the activation
    return notes


def backward_task() -> int:
    """Return the number of the backward pass that this code runs in, or -1."""
    # Private, but what torch.utils.checkpoint itself asks to know whether it runs inside backward.
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _is_recomputed() -> bool:
    return backward_task() != -1


def _scope(chain: Chain) -> Scope | None:
    """Return the innermost call of an owner of the chain; forward and recomputation in backward must not mix."""
    scope = RUNNING.scope
    while scope is not None:
        for owned in scope.chains:
            if owned is chain:
                return scope if scope.task == backward_task() else None
        scope = scope.outer
    return None


def _received(link: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Handover:
    """Find what the block before has handed on.

    Raises:
        RuntimeError: if there is nothing, more than one thing, or it was made without autograd and gradients are due.
    """
    stream, certain = link.stream_in(args, kwargs)
    found = _noted(stream, link, certain)
    if not (found and (certain or _is_recomputed())):
        scope = _scope(link.chain)
        left = [] if scope is None else [other for other in scope.handovers if other.link.chain is link.chain]
        if not certain and (len(left) != 1 or any(other is not left[0] for other in found)):
            raise RuntimeError(_which_stream(link, len(stream)))
        if len(left) != 1:
            found = _made_of(stream, link.chain) or []
        else:  # unless the stream was made of other things
            found = left if not left[0].in_graph or _made_of(stream, link.chain, left[0]) != [] else []
        if len(found) == 1 and torch.is_grad_enabled():
            for tensor in stream:  # so that a recomputation of this block finds it
                if torch.compiler.is_compiling() or tensor.grad_fn is not None:  # others may outlive the forward
                    _notes(tensor).give(link, found[0])
    if len(found) != 1 or not link.follows(found[0].link):
        raise RuntimeError(_no_state(link))
    lost = torch.is_grad_enabled() and not found[0].grad
    if lost and any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
        raise RuntimeError(
            "Gradients through the attention state would be lost: the block before was run without autograd, as "
            "reentrant activation checkpointing of single blocks does. Pass use_reentrant=False to "
            "torch.utils.checkpoint.checkpoint, or checkpoint whole stages."
        )
    return found[0]


def _noted(stream: list[Tensor], link: Link, certain: bool) -> list[Handover]:
    """Return the different handovers that are noted on the stream; only sure ones if it is not certain."""
    found: list[Handover] = []
    for tensor in stream:
        notes = getattr(tensor, "_dia_notes", None)
        handover = notes.find(link, certain) if isinstance(notes, _Notes) else None
        if handover is not None and all(handover is not other for other in found):
            found.append(handover)
    return found


def _made_of(stream: list[Tensor], chain: Chain, sought: Handover | None = None) -> list[Handover] | None:
    """Return the different handovers of the chain among the operations that made the stream, or the one that is sought.

    ``None`` if there are too many operations to tell, or none.
    """
    nodes: deque[Any] = deque(() if torch.compiler.is_compiling() else (tensor.grad_fn for tensor in stream))
    seen: set[Any] = {None}
    found: list[Handover] = []
    while nodes:
        node = nodes.popleft()
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > OPERATIONS:
            return None
        handover: Handover | None = node.metadata.get(chain)
        if handover is None:
            nodes.extend(parent for parent, _ in node.next_functions)
        elif handover is sought:
            return [handover]
        elif all(handover is not other for other in found):
            found.append(handover)
    return found if len(seen) > 1 else None


def _number(link: Link) -> int:
    return next(number for number, other in enumerate(link.chain.links) if other is link)


def _no_state(link: Link) -> str:
    block = f"Block {_number(link)} of a stage with shared attention"
    if not _is_recomputed():
        return (
            f"{block} was called without the state of the blocks before it. Run the blocks of a stage in order, each "
            "once per forward, inside the forward of the module that holds them or each on what the one before "
            "returned. The first block of a stage holds the attention and cannot be skipped: leave it out of layer "
            "drop, or give every block its own with share='block'."
        )
    frame, reentrant = sys._getframe(), False
    while frame is not None:
        reentrant |= frame.f_code is CheckpointFunction.backward.__code__
        frame = frame.f_back  # type: ignore[assignment]
    cause = "reentrant activation checkpointing gives it a copy of its input. Pass use_reentrant=False"
    if not reentrant:
        cause = "its input is a copy of that of the forward. Let nothing copy the inputs of checkpointed blocks"
    return (
        f"{block} was recomputed in backward without the state of the blocks before it: {cause}, or checkpoint whole "
        "stages."
    )


def _which_stream(link: Link, count: int) -> str:
    return (
        f"Block {_number(link)} of a stage with shared attention was given {count} tensors of features, and it is not "
        "known which of them carries the state of the blocks before it. Run the blocks of one stream inside the "
        "forward of the module that holds them, each once per forward and with nothing skipped in between."
    )


def _sites_did_not_run(frame: Frame) -> str:
    slots = frame.link.slots
    paths = ", ".join(f"{slot.path!r} ({type(site).__name__})" for slot, site in zip(slots, frame.sites, strict=True))
    return (
        f"{frame.ran} of {len(slots)} sites with attention ran in one call of {type(frame.block).__name__}: {paths}. "
        "Each must be called once. Does the block return early, call forward() instead of the module, or hand its "
        "weights to a fused kernel? Then detach() and choose other sites."
    )
