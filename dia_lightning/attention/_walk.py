"""Trace the end of a residual branch back to the layer that makes it."""

from dataclasses import dataclass

from dia_lightning.attention._graph import Call, Value
from dia_lightning.attention._operations import ACTIVATIONS, DROPOUT, JOINING, LAYOUT, NARROWING, SCALE, SUMS

#: Operations that only move, drop or scale entries.
_PASSING = LAYOUT | DROPOUT | SCALE


@dataclass(frozen=True)
class Ending:
    """A layer that ends a residual branch.

    Args:
        path: of the layer in the network.
        before: whether the layer's input ends the branch instead of its output.
        value: the value that ends the branch.
    """

    path: str
    before: bool
    value: Value


class NoBranchError(Exception):
    """An addition does not add a branch to a shortcut, or no layer ends the branch."""


class Walk:
    """Traces the end of a branch back to the layer that makes it."""

    def __init__(self, call: Call, between: set[Value]) -> None:
        self.call = call
        self.between = between
        self.makers: dict[Value, list[Call]] = {}  # innermost first
        self.runs: dict[str, int] = {}
        for inner in call.within():
            self.runs[inner.path] = self.runs.get(inner.path, 0) + 1
            if inner.returned is not None:
                self.makers.setdefault(inner.returned, []).append(inner)

    def from_sum(self, end: Value) -> list[list[Ending]]:
        """Return the layers that could end a branch, best first; for a branch that is a sum, those of each summand."""
        layers: list[Ending] = []  # whose output ends the branch, the latest first
        before: list[Ending] = []  # whose input does
        value, stopped = end, ""
        while True:
            makers = [maker for maker in self.makers.get(value, []) if self.is_usable(maker)]
            passing = {maker: self.passed(maker) for maker in makers}
            here = [Ending(maker.path, False, value) for maker in makers if passing[maker] is None]
            layers = [*here, *layers]
            first = {maker: next(iter(maker.given.values()), []) for maker in makers}
            before = [
                *(Ending(maker.path, True, input) for maker, input in passing.items() if input in first[maker]),
                *before,
            ]
            if value.made_by in SUMS and value.call is self.call and not layers:
                parts = [parent for parent in value.parents if parent in self.between]
                if len(parts) == len(value.parents) == 2:
                    return [ending for part in parts for ending in self.from_sum(part)]
            upstream = self.step(value, over_activations=not layers)
            if upstream is None:
                stopped = value.made_by
                break
            value = upstream
        if not layers and not before:
            if stopped in JOINING or not keeps_channels(value):
                raise NoBranchError("what is added is a slice or a concatenation of channels")
            runs = [maker.path for maker in self.makers.get(value, []) if self.runs[maker.path] > 1]
            if runs:
                raise NoBranchError(f"the layer that ends its branch, {runs[0]!r}, runs several times in a block")
            raise NoBranchError(f"its branch ends in {stopped!r} in the code of the block, not in a layer")
        return [[*layers, *before]]

    def is_usable(self, maker: Call) -> bool:
        inside = not self.call.path or maker.path.startswith(f"{self.call.path}.")
        return inside and self.runs[maker.path] == 1

    def passed(self, maker: Call) -> Value | None:
        """Return a layer's input, if the layer only drops, scales or moves it; else ``None``."""
        inputs, value = maker.inputs(), maker.returned
        while value is not None and value not in inputs:
            value = self.step(value, over_activations=False)
        return value

    def step(self, value: Value, *, over_activations: bool) -> Value | None:
        """Return the value that another one is a dropped, scaled or moved form of."""
        parents = [parent for parent in value.parents if parent in self.between]
        name = value.made_by
        if value not in self.between or len(parents) != 1:
            return None
        return parents[0] if name in _PASSING or (over_activations and name in ACTIVATIONS) else None


def keeps_channels(value: Value) -> bool:
    """Return whether an operation that may slice keeps all channels, as far as is known."""
    if value.made_by not in NARROWING:
        return True
    sizes = [None if v.channel_axis is None else v.shape[v.channel_axis] for v in (value, value.parents[0])]
    return sizes[0] is not None and sizes[0] == sizes[1]
