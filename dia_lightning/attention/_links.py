"""Where attention is: what a block knows about its place in the network, the same for every forward."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(eq=False)
class Slot:
    """A place in a block whose layer ends a residual branch, whichever layer is there at the moment.

    Args:
        path: of the layer, relative to the block.
        before: whether the layer's input is multiplied instead of its output.
        channels: number of channels there.
        channel_axis: axis of the channels; -1 where they come last, for any number of axes.
        batch_axis: axis of the samples.
        ndim: number of axes of the features, if known from a run or the kind of layer.
        branch_norm: name of the block's norm between the site and the unit, for branches that do not end in one.
        unit_norm: name of the block's norm that replaces the unit's own.
        stage: number of the site's stage, counted from 0, whichever units are shared.
        layer: number of the slot in the network, in the order in which those of a stage run.
        is_whole: whether the unit is a module of the network, which returns features rather than a map.
        watcher: called with the map and the state after it, every time; it must not change them.
    """

    path: str
    before: bool
    channels: int
    channel_axis: int
    batch_axis: int
    ndim: int | None
    branch_norm: str | None
    unit_norm: str | None
    stage: int
    layer: int
    is_whole: bool = False
    watcher: Callable[[Tensor, Any], None] | None = None

    @property
    def is_channels_second(self) -> bool:
        """Return whether samples come first and channels second, so the features need not be permuted."""
        return (self.batch_axis, self.channel_axis) == (0, 1)


class Chain:
    """Blocks that share a unit. A copy is another chain."""

    #: How it was attached, in a form that a config can hold.
    description: dict[str, Any] | None = None

    def __init__(self) -> None:
        self.links: list[Link] = []  # a copy of one link finds the others here, instead of one by one through `before`


class Link:
    """A block's place in its chain.

    Args:
        chain: the chain to append the link to.
        path: of the block in the network, for messages.
        slots: where the block ends its residual branches; empty if it only passes the state on.
        parameters: names of the parameters of the block's forward.
        stream: index of the parameter that is the residual stream; ``None`` if unknown.
        unit: name under which the unit is registered in the first block of the chain.
    """

    def __init__(
        self,
        chain: Chain,
        path: str,
        slots: tuple[Slot, ...],
        parameters: tuple[str, ...],
        stream: int | None,
        unit: str,
    ) -> None:
        self.chain = chain
        self.path = path
        self.slots = slots
        self.parameters = parameters
        self.stream = stream
        self.unit = unit
        self.before = chain.links[-1] if chain.links else None
        self.last = True
        if self.before is not None:
            self.before.last = False
        chain.links.append(self)

    def follows(self, other: "Link") -> bool:
        """Return whether another link comes earlier in the chain."""
        before = self.before
        while before is not None and before is not other:
            before = before.before
        return before is not None

    def stream_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], bool]:
        """Return the tensors of the stream, or those that could be it, and whether that is certain."""
        if self.stream is not None and self.parameters:
            name = self.parameters[self.stream]
            return tensors_in(args[self.stream] if self.stream < len(args) else kwargs.get(name)), True
        features = [tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim >= 3 and tensor.is_floating_point()]
        return features, len(features) <= 1


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the positional parameters of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, mappings and dataclasses."""
    return [value] if isinstance(value, Tensor) else list(_leaves(value))


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Mapping) or is_dataclass(value):
        for item in (value if isinstance(value, Mapping) else vars(value)).values():
            yield from _leaves(item)
