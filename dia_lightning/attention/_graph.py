"""The record of a run of a network: values, the module calls that made them, and additions."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(eq=False)
class Value:
    """A tensor as an operation left it; writing it in place makes another value.

    Args:
        number: increases in the order in which values are made.
        made_by: name of the operation; empty for inputs of the network and for weights.
        parents: inputs of the operation.
        live: whether it depends on the network's input, rather than on weights alone.
        shape: of the tensor.
        channel_axis: axis of the channels, counted from 0; ``None`` if it is lost.
        call: the module call that ran the operation.
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
        module: the module, in the copy.
        outer: the call it runs in.
        given: the values in each argument, by the argument's name.
        is_first: whether this is the module's first call; a recurrent network calls it at every step.
        is_simple: whether it takes one positional tensor and returns one.
        returned: its first output; ``None`` if that is not a tensor.
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
        """Return all input values of the call."""
        return {value for values in self.given.values() for value in values}

    def is_in(self, path: str) -> bool:
        """Return whether this ran in a call of a module."""
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
        queries: shapes of the inputs of torch's attention, tokens first.
    """

    samples: int
    calls: list[Call] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    queries: list[torch.Size] = field(default_factory=list)

    def is_only_in(self, path: str, block: str) -> bool:
        """Return whether a module was only called within calls of a block."""
        return all(call.is_in(block) for call in self.calls if call.path == path)


def ancestors(value: Value, stop: set[Value]) -> set[Value]:
    """Return a value and everything it derives from, up to those in ``stop``."""
    seen, waiting = {value}, [value]
    while waiting:
        current = waiting.pop()
        if current not in stop:
            new = [parent for parent in current.parents if parent not in seen]
            seen.update(new)
            waiting.extend(new)
    return seen


def made_on_the_way(value: Value, origin: Value, stop: set[Value]) -> set[Value]:
    """Return the values on the paths from an origin to a value, including both."""
    made = {origin}
    for current in sorted(ancestors(value, stop), key=lambda current: current.number):
        if current not in stop and any(parent in made for parent in current.parents):
            made.add(current)
    return made
