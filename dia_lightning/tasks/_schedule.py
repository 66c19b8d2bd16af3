"""Learning rates over time, in closed form."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Unit = Literal["epoch", "step"]


@dataclass
class Curve:
    """Fraction of the full learning rate at each time.

    Args:
        name: ``"step"`` multiplies the rate by ``gamma`` at each milestone, ``"cosine"`` decays it to 0 along half
            a cosine from the end of the warm-up to the end of the training, ``"constant"`` keeps it.
        unit: the unit of time: epochs or optimizer steps, both from 0.
        milestones: times, warm-up included.
        gamma: factor at each milestone.
        warmup: time during which the rate rises linearly to its full value.
        length: time at which the training ends; needed only for ``"cosine"``.
    """

    name: str
    unit: Unit = "epoch"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup: int = 0
    length: int | None = None

    def __call__(self, time: int) -> float:
        """Return the fraction at a time."""
        if time < self.warmup:
            return (time + 1) / (self.warmup + 1)
        if self.name == "step":
            return self.gamma ** bisect_right(self.milestones, time)
        if self.name == "cosine" and self.length is not None:
            return (1 + math.cos(math.pi * (time - self.warmup) / max(1, self.length - self.warmup))) / 2
        return 1.0


class NamedSchedule(LRScheduler):
    """Sets the rates of an optimizer to their full value times a curve, whatever they were before.

    If a rate is changed from outside, the full value is adjusted to match it.

    Args:
        optimizer: the optimizer whose rates are set.
        curve: the fraction at each time.
    """

    def __init__(self, optimizer: Optimizer, curve: Curve) -> None:
        self.curve = self.planned = curve  # a checkpoint replaces it by the one it was trained with
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the rates at the current time."""
        before = self.curve(self.last_epoch - 1) if self.last_epoch > 0 else 0.0
        for number, group in enumerate(self.optimizer.param_groups):
            if before > 0 and group["lr"] != self._last_lr[number]:
                self.base_lrs[number] = group["lr"] / before
        return [rate * self.curve(self.last_epoch) for rate in self.base_lrs]

    def follow(self, curve: Curve) -> None:
        """Replace the curve, without changing the optimizer's rates."""
        self.curve = curve
        self._last_lr = [rate * curve(self.last_epoch) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        names = ("last_epoch", "_step_count", "base_lrs", "_last_lr")
        return {"curve": asdict(self.curve), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the curve of a checkpoint, including those of version 0.1, which had torch schedules.

        Raises:
            ValueError: if it belongs to another schedule.
        """
        state = state_dict if "curve" in state_dict else _from_torch(state_dict)
        self.curve = Curve(**state["curve"])
        vars(self).update({name: value for name, value in state.items() if name != "curve"})


def _from_torch(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curve of a ``MultiStepLR`` or ``CosineAnnealingLR``, with or without a ``LinearLR`` before it."""
    parts = state.get("_schedulers", [state])
    main, warmup = parts[-1], state["_milestones"][0] if len(parts) > 1 else 0
    if "T_max" in main:
        curve = Curve("cosine", warmup=warmup, length=main["T_max"] + warmup)
    elif "milestones" in main:
        milestones = sorted(epoch + warmup for epoch in main["milestones"])
        curve = Curve("step" if milestones else "constant", "epoch", milestones, main["gamma"], warmup)
    else:
        raise ValueError(
            "The checkpoint was trained with a custom schedule, which cannot continue as 'step', 'cosine' or "
            "'constant'. Pass the same schedule, or start anew from the weights with init_from."
        )
    kept = {name: state[name] for name in ("last_epoch", "_last_lr")}
    return {"curve": asdict(curve), **kept, "base_lrs": parts[0]["base_lrs"]}


class Warmup(LRScheduler):
    """Counts the time of a linear warm-up that multiplies a schedule; :class:`GroupRates` applies it.

    Args:
        optimizer: the optimizer to warm up.
        total_iters: time after which rates are full.
        start_factor: fraction of the full rate at the start.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int, start_factor: float) -> None:
        self.total_iters = total_iters
        self.start_factor = start_factor
        super().__init__(optimizer)

    @property
    def factor(self) -> float:
        """Fraction of the rate at the current time."""
        if self.last_epoch >= self.total_iters:
            return 1.0
        return self.start_factor + (1 - self.start_factor) * self.last_epoch / self.total_iters

    def get_lr(self) -> list[Any]:
        """Return the rates unchanged."""
        return [group["lr"] for group in self.optimizer.param_groups]
