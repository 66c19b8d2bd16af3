"""What a run of a network has recorded: values, the calls of modules that made them, and additions."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(eq=False)
class Value:
    """A tensor as an operation has left it; one that is written in place is another value after that.

    Args:
        number: values that are made later have higher ones.
        made_by: name of the operation; of what goes into the network, and of weights, the empty text.
        parents: what the operation was given.
        live: whether it depends on what goes into the network, and not on weights alone.
        shape: of the tensor.
        channel_axis: axis of the channels, from 0 on; ``None`` if it is lost.
        call: the call of a module that ran the operation.
        is_causal: whether the operation is attention to earlier tokens only.
    """

    number: int
    made_by: str
    parents: "tuple[Value, ...]"
    live: bool
    shape: tuple[int, ...]
    channel_axis: int | None
    call: "Call | None"
    is_causal: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(eq=False)
class Call:
    """A call of a module.

    Args:
        path: of the module in the network.
        module: the module, of the copy.
        outer: the call that it runs in.
        given: the values in each argument, by the argument's name.
        is_first: whether the module was not called before, as it is at each later step of a recurrent network.
        is_simple: whether it takes one tensor, by position, and puts out one.
        returned: what it puts out first; ``None`` if that is no tensor.
        inner: calls that ran in this one, in order.
    """

    path: str
    module: nn.Module
    outer: "Call | None"
    given: dict[str, list[Value]]
    is_first: bool
    is_simple: bool = True
    returned: Value | None = None
    inner: "list[Call]" = field(default_factory=list)

    def inputs(self) -> set[Value]:
        """Return all values that the call was given."""
        return {value for values in self.given.values() for value in values}

    def is_in(self, path: str) -> bool:
        """Tell whether this ran in a call of a module."""
        outer = self.outer
        while outer is not None and outer.path != path:
            outer = outer.outer
        return outer is not None

    def within(self) -> "Iterator[Call]":
        """Yield all calls inside this one, in the order in which they end."""
        for call in self.inner:
            yield from call.within()
            yield call


@dataclass(eq=False)
class Addition:
    """An addition of two tensors of one shape.

    Args:
        call: of the module whose code adds.
        operands: what is added.
        result: the sum.
    """

    call: Call
    operands: tuple[Value, Value]
    result: Value


@dataclass
class Run:
    """A forward of a network.

    Args:
        samples: their number.
        calls: of modules, in the order in which they end.
        additions: in the order in which they ran.
        queries: shapes of what torch's attention was given, tokens first.
    """

    samples: int
    calls: list[Call] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    queries: list[torch.Size] = field(default_factory=list)

    def is_only_in(self, path: str, block: str) -> bool:
        """Tell whether a module was called in calls of a block only."""
        return all(call.is_in(block) for call in self.calls if call.path == path)


def ancestors(value: Value, stop: set[Value]) -> set[Value]:
    """Return a value and all that it was made of, up to some at which to stop."""
    seen, waiting = {value}, [value]
    while waiting:
        current = waiting.pop()
        if current not in stop:
            new = [parent for parent in current.parents if parent not in seen]
            seen.update(new)
            waiting.extend(new)
    return seen


def made_on_the_way(value: Value, origin: Value, stop: set[Value]) -> set[Value]:
    """Return what was made of an origin on the way to a value, with both."""
    made = {origin}
    for current in sorted(ancestors(value, stop), key=lambda current: current.number):
        if current not in stop and any(parent in made for parent in current.parents):
            made.add(current)
    return made
