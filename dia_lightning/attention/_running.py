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
compilers need one graph for them. Within one call of an owner, without autograd or compiled, and with code between
blocks, a stream that skips the first block cannot be told from another one that has left after it.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dia_lightning.attention._links import Chain, Link


@dataclass(eq=False)
class Handover:
    """What a block hands on to the next one of its chain.

    Args:
        unit: the unit of the chain.
        state: its state.
        link: of the block.
        grad: whether autograd recorded how the state was made.
        placement: device and dtype of the features that the unit saw last, if any.
        samples: how many these were.
        in_graph: whether the handover is noted on an operation.
    """

    unit: nn.Module
    state: Any
    link: Link
    grad: bool
    placement: tuple[torch.device, torch.dtype] | None
    samples: int | None
    in_graph: bool = False


class Rider:
    """What rides on an activation as an attribute. It stays behind when the tensor is copied or saved."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # loads with weights_only=True


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


class Running(threading.local):
    """Innermost frame and scope of a thread."""

    def __init__(self) -> None:
        self.frame: Any = None  # a Frame, which knows of this
        self.scope: Scope | None = None


RUNNING = Running()


def backward_task() -> int:
    """Return the number of the backward pass that this code runs in, or -1."""
    # Private, but what torch.utils.checkpoint itself asks to know whether it runs inside backward.
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def is_recomputed() -> bool:
    """Tell whether this code runs inside a backward pass, as what a checkpoint recomputes does."""
    return backward_task() != -1


def scope_of(chain: Chain) -> Scope | None:
    """Return the innermost call of an owner of the chain; forward and recomputation in backward must not mix."""
    scope = RUNNING.scope
    while scope is not None:
        for owned in scope.chains:
            if owned is chain:
                return scope if scope.task == backward_task() else None
        scope = scope.outer
    return None
