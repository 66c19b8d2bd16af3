"""Where attention is: what a block knows of its place in the network, the same for every forward."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(eq=False)
class Slot:
    """A place in a block whose layer ends a residual branch, whatever layer that is at the moment.

    Args:
        path: of the layer, from the block.
        before: whether the layer's input is multiplied, and not its output.
        channels: number of channels there.
        channel_axis: axis of the channels; -1 where they come last, in features of any number of axes.
        batch_axis: axis of the samples.
        ndim: number of axes of the features, if a run or the kind of layer tells it.
        branch_norm: name of the block's norm between the site and the unit, for branches that do not end in one.
        unit_norm: name of the block's norm that takes the place of the unit's own.
        stage: number of the stage that the site belongs to, from 0 on, whatever units are shared.
        layer: number of the slot in the network, in the order in which those of a stage run.
        is_whole: whether the unit is a module of the network, which puts out features and no map.
        watcher: is given the map and the state after it, in every call; it must not change them.
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
        """Tell whether samples come first and channels second, so that the features need not be turned."""
        return (self.batch_axis, self.channel_axis) == (0, 1)


class Chain:
    """Blocks that share a unit. A copy is another chain."""

    #: How it was attached, in words that a config can hold.
    description: dict[str, Any] | None = None

    def __init__(self) -> None:
        self.links: list[Link] = []  # a copy of one link finds the others here, instead of one by one through `before`


class Link:
    """A block's place in its chain.

    Args:
        chain: the chain, to whose end the link is added.
        path: of the block in the network, for messages.
        slots: where the block ends its residual branches; none if it only hands the state on.
        parameters: names of what the block's forward takes.
        stream: number of the parameter that is the residual stream; ``None`` if that is not known.
        unit: under which name the unit is registered in the first block of the chain.
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
        """Tell whether another link comes earlier in the chain."""
        before = self.before
        while before is not None and before is not other:
            before = before.before
        return before is not None

    def stream_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], bool]:
        """Return the tensors of the stream, or those that could be it, and whether it is certain that they are."""
        if self.stream is not None and self.parameters:
            name = self.parameters[self.stream]
            return tensors_in(args[self.stream] if self.stream < len(args) else kwargs.get(name)), True
        features = [tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim >= 3 and tensor.is_floating_point()]
        return features, len(features) <= 1


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what a module's forward takes by position."""
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
