"""How a block finds the handover of the block before."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from dia_lightning.attention._links import Chain, Link
from dia_lightning.attention._running import Handover, Rider, is_recomputed, scope_of

#: How many operations back to search for a handover.
MAX_OPERATIONS = 2000


def received(link: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Handover:
    """Find the handover of the block before.

    Raises:
        RuntimeError: if there is none or more than one, or it was made without autograd but gradients are needed.
    """
    stream, certain = link.stream_in(args, kwargs)
    found = [handover for handover in _noted(stream, link, certain) if link.follows(handover.link)]
    if not (found and (certain or is_recomputed())):
        scope = scope_of(link.chain)
        left = [] if scope is None else [other for other in scope.handovers if link.follows(other.link)]
        if not certain and (len(left) != 1 or any(other is not left[0] for other in found)):
            raise RuntimeError(_which_stream(len(stream)))
        found = left if len(left) == 1 and _may_be_made_of(stream, left[0]) else _made_of(stream, link.chain)
        if len(found) == 1 and torch.is_grad_enabled():
            for tensor in stream:  # so that recomputing this block finds it
                if torch.compiler.is_compiling() or tensor.grad_fn is not None:  # others may outlive the forward
                    _notes_on(tensor).give(link, found[0])
    if len(found) != 1 or not link.follows(found[0].link):
        raise RuntimeError(_no_state(link))
    if torch.is_grad_enabled() and not found[0].grad and _passed_reentrant_checkpoint(stream):
        raise RuntimeError(
            "Gradients through the attention state would be lost: the block before was run without autograd by "
            "reentrant activation checkpointing. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or "
            "checkpoint whole stages."
        )
    return found[0]


def note(tensor: Tensor, handover: Handover) -> None:
    """Note a block's handover on the tensor that it returns, and on the operation that made it."""
    _notes_on(tensor).leave(handover, _version(tensor))
    if not torch.compiler.is_compiling() and tensor.grad_fn is not None:
        tensor.grad_fn.metadata[handover.link.chain] = handover  # type: ignore[index]  # typed as a method
        handover.in_graph = True


class _Notes(Rider):
    """The notes on a tensor, valid until it is written."""

    def __init__(self) -> None:
        # left by the block that returned the tensor, one per chain, with the version of the tensor
        self.left: list[tuple[Handover, int]] = []
        # received by a block that took the tensor; None once two forwards passed it with different ones
        self.given: list[tuple[Link, Handover | None]] = []

    def leave(self, handover: Handover, version: int) -> None:
        others = [(other, at) for other, at in self.left if other.link.chain is not handover.link.chain]
        self.left = [*others, (handover, version)]

    def give(self, link: Link, handover: Handover) -> None:
        known = [other for to, other in self.given if to is link]
        others = [(to, other) for to, other in self.given if to is not link]
        self.given = [*others, (link, handover if not known or known[0] is handover else None)]

    def find(self, link: Link, certain: bool, version: int) -> Handover | None:
        for to, handover in self.given if is_recomputed() else ():
            if to is link:
                return handover
        for handover, at in self.left if certain or not is_recomputed() else ():
            if handover.link.chain is link.chain and at == version:
                return handover
        return None


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written in place, as far as is known."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _notes_on(tensor: Tensor) -> _Notes:
    """Return the notes on a tensor; new ones if there are none yet."""
    notes: _Notes | None = getattr(tensor, "_dia_notes", None)
    if not isinstance(notes, _Notes):  # none yet, or a loaded tensor's
        notes = tensor._dia_notes = _Notes()  # type: ignore[attr-defined]  # rides on the activation
    return notes


def _noted(stream: list[Tensor], link: Link, certain: bool) -> list[Handover]:
    """Return the distinct handovers noted on the stream; only sure ones if the stream is uncertain."""
    noted = [(tensor, getattr(tensor, "_dia_notes", None)) for tensor in stream]
    return _different(
        notes.find(link, certain, _version(tensor)) for tensor, notes in noted if isinstance(notes, _Notes)
    )


def _different(handovers: Iterable[Handover | None]) -> list[Handover]:
    """Return the handovers without ``None`` and repetitions."""
    found: list[Handover] = []
    for handover in handovers:
        if handover is not None and all(handover is not other for other in found):
            found.append(handover)
    return found


def _may_be_made_of(stream: list[Tensor], handover: Handover) -> bool:
    """Return whether a stream may derive from what a block returned, as far as autograd knows."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and handover.in_graph):
        return True
    return any(other is handover for other in _noted_on_operations(stream, handover.link.chain))


def _passed_reentrant_checkpoint(stream: list[Tensor]) -> bool:
    """Return whether a reentrant checkpoint hides from autograd what made a stream."""
    if torch.compiler.is_compiling():
        return False
    return any("CheckpointFunction" in type(node).__name__ for node in _operations(stream, lambda node: False))


def _made_of(stream: list[Tensor], chain: Chain) -> list[Handover]:
    """Return the distinct handovers of a chain among the operations that made a stream; none if there are too many."""
    noted = [] if torch.compiler.is_compiling() else list(_noted_on_operations(stream, chain))
    return _different(noted) if len(noted) < MAX_OPERATIONS else []


def _noted_on_operations(stream: list[Tensor], chain: Chain) -> Iterator[Handover | None]:
    """Yield what is noted on the operations that made a stream, nearest first, going no further than a noted one."""
    for node in _operations(stream, lambda node: node.metadata.get(chain) is not None):
        yield node.metadata.get(chain)


def _operations(stream: list[Tensor], is_end: Callable[[Any], bool]) -> Iterator[Any]:
    """Yield the operations that made a stream, nearest first, going no further than those where ``is_end`` is true."""
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
    if not is_recomputed():
        without = "" if torch.is_grad_enabled() else " and without autograd, as here"
        return (
            f"{block} was called without the state of the blocks before it ({link.path!r}). Run the blocks of a stage "
            f"in order, each on what the one before returned; with other code in between{without}, inside the forward "
            f"of the module that holds them. The first block of a stage ({link.chain.links[0].path!r}) holds the "
            "attention and cannot be skipped or replaced: exclude it from layer drop, or give every block its own unit "
            "with share='block'."
        )
    frame, reentrant = sys._getframe(), False
    while frame is not None:
        reentrant |= frame.f_code is CheckpointFunction.backward.__code__
        frame = frame.f_back  # type: ignore[assignment]
    cause = "its input is a copy of the one in the forward. Do not copy the inputs of checkpointed blocks"
    if reentrant:
        cause = "reentrant activation checkpointing gives it a copy of its input. Pass use_reentrant=False"
    return (
        f"{block} was recomputed in backward without the state of those before it: {cause}, or checkpoint whole stages."
    )


def _which_stream(count: int) -> str:
    return (
        f"A block of a stage with shared attention received {count} tensors of features, and it is not known which of "
        "them carries the state of the blocks before it. Run the blocks of one stream inside the forward of the module "
        "that holds them, each once per forward."
    )
