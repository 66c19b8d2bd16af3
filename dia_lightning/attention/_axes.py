"""The channel axis of a tensor after an operation, from the one before it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dia_lightning.attention._graph import Value
from dia_lightning.attention._operations import CHANNELS_LAST, CHANNELS_SECOND, MOVING, RESIZING


def axis_after(
    name: str, given: Sequence[Value], shape: tuple[int, ...], index: Any, again: Callable[[Tensor], Any]
) -> int | None:
    """Return the channel axis in the result of an operation, counted from 0; ``None`` if it is unknown.

    Args:
        name: of the operation.
        given: its input tensors.
        shape: of the result.
        index: its second argument, which for ``__getitem__`` is what to take.
        again: runs the operation with another tensor instead of the first.
    """
    if name.startswith(CHANNELS_SECOND) and name != "conv1d":
        return 1 if len(shape) > 2 else None
    known = [value for value in given if value.live and value.channel_axis is not None]
    # the operand that has the shape of the result, rather than one that broadcasts
    source = next((value for value in known if value.shape == shape), known[0] if known else None)
    if name in CHANNELS_LAST or name == "conv1d":
        mixed = 1 if name == "conv1d" else len(shape) - 1
        if source is None or source.channel_axis == mixed or len(source.shape) != len(shape):
            return mixed
        return source.channel_axis  # positions are mixed, as in MLP-Mixer
    if source is None:
        return None
    axis, before = source.channel_axis, source.shape
    assert axis is not None
    if name in MOVING:
        sizes = range(2, 2 + len(before))  # all different
        moved: tuple[int, ...] = tuple(again(torch.empty(*sizes, device="meta")).shape)
        return moved.index(sizes[axis])
    if before == shape or (len(before) == len(shape) and _keeps_axes(name, index)):
        return axis
    return _reshaped(before, axis, shape)


def _keeps_axes(name: str, index: Any) -> bool:
    """Return whether an operation only changes the sizes of axes."""
    if name == "__getitem__":
        parts = index if isinstance(index, tuple) else (index,)
        return all(isinstance(part, slice) or part is Ellipsis for part in parts)
    return name in RESIZING or "pool" in name


def _reshaped(before: tuple[int, ...], axis: int, shape: tuple[int, ...]) -> int | None:
    """Follow an axis through a reshape of the others: the axes before it, or after it, must hold as many entries."""
    channels = before[axis]
    if axis == len(before) - 1 and shape[-1:] == (channels,):
        return len(shape) - 1
    if axis < len(shape) and shape[axis] == channels and shape[:axis] == before[:axis]:
        return axis
    left = math.prod(before[:axis])
    for other, size in enumerate(shape):
        if (
            size == channels
            and math.prod(shape[:other]) == left
            and math.prod(shape[other:]) == math.prod(before[axis:])
        ):
            return other
    return None
