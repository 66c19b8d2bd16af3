"""The unit of a chain, as a site calls it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dia_lightning.attention._frame import Frame
from dia_lightning.attention._links import Slot
from dia_lightning.attention._roles import Role
from dia_lightning.attention._running import RUNNING


class AttachedUnit(Role):
    """Role of a unit: a site that calls it gets only the map, and the state goes to the running frame.

    This way module hooks, as registered by summaries, counters and sharding, see one tensor. Any other caller gets what
    the unit always returns.
    """

    rank = 2
    equals_plain = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame: Frame | None = RUNNING.frame
        result = super().forward(*args, **kwargs)
        if frame is None or not frame.wants_map:
            return result
        frame.wants_map = False
        return _split(result, frame, self)


def attend(frame: Frame, slot: Slot, features: Tensor, mean: Tensor | None) -> Tensor:
    """Return the map of features [B, C, H, W] from the unit of a frame, and step its state.

    Args:
        frame: of the block.
        slot: of the site.
        features: the features.
        mean: [B, C] that the unit uses instead of its own, if any.
    """
    options: dict[str, Any] = {}
    if slot.unit_norm is not None:
        options["norm"] = frame.block.get_submodule(slot.unit_norm)
    if mean is not None:
        options["mean"] = mean
    given = features
    if frame.samples not in (None, 1, features.shape[0]) and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"Between two blocks of a stage with shared attention {frame.samples} samples became {features.shape[0]}, "
            "so the state would go to the wrong ones. Drop samples before or after a stage, or give every block its "
            "own unit with share='block'."
        )
    if frame.placement is not None and frame.placement != (features.device, features.dtype):
        given, options = _to_unit(frame.unit, features, options)
        frame.state = _to(frame.state, given)
    frame.placement = features.device, features.dtype
    frame.samples = None if torch.compiler.is_compiling() else features.shape[0]
    running, RUNNING.frame = RUNNING.frame, frame
    frame.wants_map = True
    result: Any = frame.unit(given, frame.state, **options)
    RUNNING.frame = running
    if frame.wants_map:  # a module that replaced the unit later
        frame.wants_map = False
        result = _split(result, frame, frame.unit)
    attention_map: Tensor = result
    fits = attention_map.ndim == features.ndim
    if not torch.compiler.is_compiling():
        fits = fits and all(own in (1, size) for own, size in zip(attention_map.shape, features.shape, strict=True))
    if not fits:
        raise RuntimeError(
            f"{type(frame.unit).__name__} must return a map of {features.ndim} axes that broadcasts against features "
            f"of shape {tuple(features.shape)}, got shape {tuple(attention_map.shape)}."
        )
    if slot.watcher is not None:
        slot.watcher(attention_map, frame.state)
    return attention_map if given is features else attention_map.to(features)


def _split(result: Any, frame: Frame, unit: nn.Module) -> Any:
    """Give a unit's state to the frame and return its map."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise RuntimeError(
            f"{type(unit).__name__}.forward must return (map, state), where the state may be None; got a "
            f"{type(result).__name__}."
        )
    attention_map, frame.state = result
    return attention_map


def _to(state: Any, features: Tensor) -> Any:
    """Move a state from another block to the device and dtype of this one's features."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(features.device, features.dtype if t.is_floating_point() else t.dtype), state
    )


def _to_unit(unit: nn.Module, features: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Move features to the device and dtype of the unit's weights, where another block runs with others."""
    weight = next(unit.parameters(), features)
    dtype = features.dtype if torch.is_autocast_enabled(features.device.type) else weight.dtype
    if weight.device.type == "meta" or (weight.device, dtype) == (features.device, features.dtype):
        return features, options
    options = {name: value.to(weight.device, dtype) if name == "mean" else value for name, value in options.items()}
    return features.to(weight.device, dtype), options
