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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from dia_lightning.attention._links import Chain, Link, Slot, tensors_in

#: How many operations back to search for a handover.
MAX_OPERATIONS = 2000


class Handover:
    """What a block hands on to the next one of its chain."""

    def __init__(self, frame: "Frame") -> None:
        self.unit: nn.Module = frame.unit
        self.state: Any = frame.state
        self.link: Link = frame.link
        self.grad: bool = frame.grad  # whether autograd recorded how the state was made
        self.placement: tuple[torch.device, torch.dtype] | None = frame.placement
        self.samples: int | None = frame.samples
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
        self,
        block: nn.Module,
        link: Link,
        sites: list[nn.Module],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        begun: bool,
    ) -> None:
        self.block = block
        self.link = link
        self.sites = sites  # in the slots of the link
        self.arguments = args, kwargs
        self.begun = begun  # whether the block's own forward was entered
        self.received = received = None if link.before is None else _received(link, args, kwargs)
        self.unit: nn.Module = block.dia if received is None else received.unit  # type: ignore[assignment]
        self.state = None if received is None else received.state
        self.placement = None if received is None else received.placement  # device and dtype of the features before
        self.samples = None if received is None or received.state is None else received.samples  # how many
        self.grad = torch.is_grad_enabled()
        self.ran: list[Slot] = []
        self.wants_map = False  # whether the unit is being called for a site
        self.outer = RUNNING.frame

    def __enter__(self) -> "Frame":
        RUNNING.frame = self
        return self

    def __exit__(self, *error: object) -> None:
        RUNNING.frame = self.outer

    def note_run(self, slot: Slot) -> None:
        """Take down that the site in a slot has run, and whether autograd sees what it does."""
        self.ran.append(slot)
        self.grad = self.grad and torch.is_grad_enabled()

    def hand_on(self, output: Any) -> None:
        """Check that every site has run, and leave the state for the next block."""
        link, stream = self.link, self.link.stream_in(*self.arguments)[0]
        returned = tensors_in(output)
        # stochastic depth may leave a branch out: the block hands on what it was given
        is_skipped = not self.ran and len(stream) == 1 and len(returned) > 0 and returned[0] is stream[0]
        all_ran = len(self.ran) == len(link.slots) and all(slot in self.ran for slot in link.slots)
        handover = None if link.last or not (all_ran or is_skipped) else Handover(self)
        self._leave_in_scope(handover)
        if not (all_ran or is_skipped):
            raise RuntimeError(_sites_did_not_run(self))
        if handover is None:
            return
        given = [] if len(returned) == 1 and not (is_skipped and link.before is None) else tensors_in(self.arguments)
        for tensor in returned:
            if any(tensor is other for other in given):
                continue  # it is not the stream, or may outlive the forward
            _notes(tensor).leave(handover, _version(tensor))
            if not torch.compiler.is_compiling() and tensor.grad_fn is not None:
                tensor.grad_fn.metadata[link.chain] = handover  # type: ignore[index]  # typed as a method
                handover.in_graph = True

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
    """What is noted on a tensor. It stays behind when the tensor is copied or saved, and counts until it is written."""

    def __init__(self) -> None:
        # what the block that returned the tensor has left, one per chain, and the version of the tensor
        self.left: list[tuple[Handover, int]] = []
        # what a block that was given the tensor received; None once two forwards gave it with different ones
        self.given: list[tuple[Link, Handover | None]] = []

    def leave(self, handover: Handover, version: int) -> None:
        others = [(other, at) for other, at in self.left if other.link.chain is not handover.link.chain]
        self.left = [*others, (handover, version)]

    def give(self, link: Link, handover: Handover) -> None:
        known = [other for to, other in self.given if to is link]
        others = [(to, other) for to, other in self.given if to is not link]
        self.given = [*others, (link, handover if not known or known[0] is handover else None)]

    def find(self, link: Link, certain: bool, version: int) -> Handover | None:
        for to, handover in self.given if _is_recomputed() else ():
            if to is link:
                return handover
        for handover, at in self.left if certain or not _is_recomputed() else ():
            if handover.link.chain is link.chain and at == version:
                return handover
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # loads with weights_only=True


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written in place, as far as it tells."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


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
        left = [] if scope is None else [other for other in scope.handovers if link.follows(other.link)]
        if not certain and (len(left) != 1 or any(other is not left[0] for other in found)):
            raise RuntimeError(_which_stream(len(stream)))
        found = left if len(left) == 1 and _may_be_made_of(stream, left[0]) else _made_of(stream, link.chain)
        if len(found) == 1 and torch.is_grad_enabled():
            for tensor in stream:  # so that a recomputation of this block finds it
                if torch.compiler.is_compiling() or tensor.grad_fn is not None:  # others may outlive the forward
                    _notes(tensor).give(link, found[0])
    if len(found) != 1 or not link.follows(found[0].link):
        raise RuntimeError(_no_state(link))
    if torch.is_grad_enabled() and not found[0].grad and _passed_reentrant_checkpoint(stream):
        raise RuntimeError(
            "Gradients through the attention state would be lost: the block before was run without autograd by "
            "reentrant activation checkpointing. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or "
            "checkpoint whole stages."
        )
    return found[0]


def _noted(stream: list[Tensor], link: Link, certain: bool) -> list[Handover]:
    """Return the different handovers that are noted on the stream; only sure ones if it is not certain."""
    found: list[Handover] = []
    for tensor in stream:
        notes = getattr(tensor, "_dia_notes", None)
        handover = notes.find(link, certain, _version(tensor)) if isinstance(notes, _Notes) else None
        if handover is not None and all(handover is not other for other in found):
            found.append(handover)
    return found


def _may_be_made_of(stream: list[Tensor], handover: Handover) -> bool:
    """Tell whether a stream can have been made of what a block returned, as far as autograd knows."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and handover.in_graph):
        return True
    return any(other is handover for other in _noted_on_operations(stream, handover.link.chain))


def _passed_reentrant_checkpoint(stream: list[Tensor]) -> bool:
    """Tell whether what made a stream is hidden from autograd by a reentrant checkpoint."""
    if torch.compiler.is_compiling():
        return False
    return any("CheckpointFunction" in type(node).__name__ for node in _operations(stream, lambda node: False))


def _made_of(stream: list[Tensor], chain: Chain) -> list[Handover]:
    """Return the different handovers of a chain among the operations that made a stream; none if they are too many."""
    noted = [] if torch.compiler.is_compiling() else list(_noted_on_operations(stream, chain))
    found: list[Handover] = []
    for handover in noted if len(noted) < MAX_OPERATIONS else ():
        if handover is not None and all(handover is not other for other in found):
            found.append(handover)
    return found


def _noted_on_operations(stream: list[Tensor], chain: Chain) -> Iterator[Handover | None]:
    """Yield what is noted on each operation that made a stream, nearest first, and on none before a noted one."""
    for node in _operations(stream, lambda node: node.metadata.get(chain) is not None):
        yield node.metadata.get(chain)


def _operations(stream: list[Tensor], is_end: Callable[[Any], bool]) -> Iterator[Any]:
    """Yield the operations that made a stream, nearest first, up to some at which to end."""
    nodes: deque[Any] = deque(tensor.grad_fn for tensor in stream)
    seen: set[Any] = {None}
    while nodes and len(seen) <= MAX_OPERATIONS:
        node = nodes.popleft()
        if node in seen:
            continue
        seen.add(node)
        if not is_end(node):
            nodes.extend(parent for parent, _ in node.next_functions)
        yield node


def _no_state(link: Link) -> str:
    number = next(number for number, other in enumerate(link.chain.links) if other is link)
    block = f"Block {number} of a stage with shared attention"
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
    cause = "its input is a copy of that of the forward. Let nothing copy the inputs of checkpointed blocks"
    if reentrant:
        cause = "reentrant activation checkpointing gives it a copy of its input. Pass use_reentrant=False"
    return (
        f"{block} was recomputed in backward without the state of those before it: {cause}, or checkpoint whole stages."
    )


def _which_stream(count: int) -> str:
    return (
        f"A block of a stage with shared attention was given {count} tensors of features, and it is not known which of "
        "them carries the state of the blocks before it. Run the blocks of one stream inside the forward of the module "
        "that holds them, each once per forward."
    )


def _sites_did_not_run(frame: Frame) -> str:
    counts = [
        f"{slot.path!r} ({type(site).__name__}) {frame.ran.count(slot)} times"
        for slot, site in zip(frame.link.slots, frame.sites, strict=True)
    ]
    return (
        f"In one call of {type(frame.block).__name__} each site with attention must be called once, but these ran: "
        f"{', '.join(counts)}. Does the block return early, call forward() instead of the module, or hand its weights "
        "to a fused kernel? Then detach() and choose other sites."
    )
