"""The unit of a chain, as a site calls it."""

from typing import Any

from torch import Tensor, nn

from dia_lightning.attention._links import Slot
from dia_lightning.attention._roles import Role
from dia_lightning.attention._running import RUNNING, Frame


class AttachedUnit(Role):
    """Role of a unit: a site that calls it gets the map alone, and the state goes to the running frame.

    So hooks on modules, as summaries, counters and sharding register them, see one tensor. Called by anybody else, a
    unit returns what it always does.
    """

    rank = 2
    equals_plain = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame = RUNNING.frame
        if frame is None or not frame.attends:
            return super().forward(*args, **kwargs)
        frame.attends = False
        attention_map, frame.state = super().forward(*args, **kwargs)
        return attention_map


def attend(frame: Frame, slot: Slot, features: Tensor, valid: Tensor | None) -> Tensor:
    """Return the map of features [B, C, H, W] from the unit of a frame, and step its state.

    Args:
        frame: of the block.
        slot: of the site.
        features: the features.
        valid: [B, H], true for real tokens; ``None`` if all are.
    """
    options: dict[str, Any] = {}
    if slot.unit_norm is not None:
        options["norm"] = frame.block.get_submodule(slot.unit_norm)
    if valid is not None:
        options["mean"] = _masked_mean(frame.unit, features, valid)
    running, RUNNING.frame = RUNNING.frame, frame
    frame.attends = True
    result: Any = frame.unit(features, _moved(frame.state, features), **options)
    RUNNING.frame = running
    if frame.attends:  # a module that was put in the place of the unit later
        frame.attends = False
        result, frame.state = result
    attention_map: Tensor = result
    if slot.watcher is not None:
        slot.watcher(attention_map, frame.state)
    return attention_map


def _masked_mean(unit: nn.Module, features: Tensor, valid: Tensor) -> Tensor:
    """Return the mean [B, C] of features [B, C, N, 1] over the real tokens."""
    if not getattr(unit, "takes_mean", False):
        raise RuntimeError(
            f"{type(unit).__name__} would count padded tokens, so that a sample depended on the longest one of its "
            "batch. Use a unit that needs the mean only (dia-lstm, se, eca), or batches without padding."
        )
    weights = valid.to(features.dtype)[:, None, :, None]  # [B, 1, N, 1]
    mean: Tensor = (features * weights).sum((2, 3)) / weights.sum((2, 3)).clamp_min(1)
    return mean


def _moved(state: Any, features: Tensor) -> Any:
    """Bring a state that another block made to the device and precision of this one's features."""
    if isinstance(state, Tensor):
        dtype = features.dtype if state.is_floating_point() else state.dtype
        return state if state.dtype == dtype and state.device == features.device else state.to(features.device, dtype)
    if isinstance(state, dict):
        return {key: _moved(value, features) for key, value in state.items()}
    if isinstance(state, tuple | list):
        moved = [_moved(value, features) for value in state]
        return type(state)(*moved) if hasattr(state, "_fields") else type(state)(moved)
    return state
