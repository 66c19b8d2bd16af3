"""What runs: how the state of a shared unit travels from block to block.

Words: a *unit* makes attention maps. A *site* is the layer that ends a residual branch; its place in the block is a
*slot*. A *block* adds the branch to the shortcut, the *stream*. A *chain* is the blocks that share a unit; its
*owner* is a module whose forward runs them. What a block leaves for the next one is a *handover*. A forward of a chain:

1. The owner is called. It opens a *scope*, in which its chains may leave handovers.
2. The first block is called. It opens a *frame* with the unit, which it holds, and no state.
3. The block's own forward runs and calls the site. The unit turns the site's output into a map and steps the state.
4. The block returns. The frame is closed: every site must have run once. The handover, unit and state, is noted on
   the tensor that the block returns and on the operation that made it, and left in the scope.
5. The next block is called. It takes the handover noted on its stream; if code in between made another tensor of it,
   the one in the scope or on the operations that the stream derives from. Then as in 2 to 4.
6. The last block leaves nothing. The owner returns and closes the scope with whatever is still in it.

A block that is recomputed alone in backward finds the note on the tensor it received in the forward. Modules keep
nothing, so threads, nested and abandoned forwards cannot mix, and equal blocks carry no number, so compilers need one
graph for them. Within one call of an owner, without autograd or compiled, and with code between blocks, a stream that
skips the first block cannot be distinguished from another one that left after it.
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
    """What a block leaves for the next one of its chain.

    Args:
        unit: the unit of the chain.
        state: its state.
        link: of the block.
        grad: whether autograd recorded how the state was made.
        placement: device and dtype of the last features the unit saw, if any.
        samples: how many samples these had.
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
    """An attribute that rides on an activation. It is dropped when the tensor is copied or saved."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # loads with weights_only=True


class Scope:
    """An owner call in progress."""

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
        self.frame: Any = None  # a Frame, whose module imports this one
        self.scope: Scope | None = None


RUNNING = Running()


def backward_task() -> int:
    """Return the number of the backward pass that this code runs in, or -1."""
    # Private, but torch.utils.checkpoint itself uses it to know whether it runs inside backward.
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def is_recomputed() -> bool:
    """Return whether this code runs inside a backward pass, as when a checkpoint recomputes."""
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
