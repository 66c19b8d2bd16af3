"""What stands between a schedule and the learning rates of the groups of an optimizer."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LRSchedulerTypeUnion
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from dia_lightning.tasks._schedule import Warmup


class GroupRates:
    """Multiplies the rates of a schedule by the factors of the groups and of the warm-up, which it never sees.

    So rates are right for schedules that set them outright and for those that change what they find. Groups that
    somebody adds to the optimizer later, such as those of Lightning's ``BackboneFinetuning``, are hidden from the
    schedule too, as many cannot have them, and rise and fall with the first group.

    Args:
        optimizer: whose groups may have a factor, ``lr_scale``.
        schedule: of the rates without factors.
        warmup: of all groups, if there is one.
        full: rate of the first group without factors, before the schedule was made.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: LRSchedulerTypeUnion, warmup: Warmup | None, full: float
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup = warmup
        self._followed: SWALR | None = None
        self._count = len(optimizer.param_groups)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # ReduceLROnPlateau does not note it
        self.brings_rates = float(optimizer.param_groups[0]["initial_lr"]) != full  # such as max_lr of OneCycleLR
        self.planned = self.full
        self._put_on()

    @property
    def full(self) -> float:
        """Rate of the first group without schedule and factors; after resuming that of the checkpoint."""
        return float(self.optimizer.param_groups[0]["initial_lr"])

    def has(self, scheduler: Any) -> bool:
        """Tell whether a scheduler is the schedule or the warm-up, and not that of a finder or a callback."""
        return scheduler is self.schedule or (scheduler is not None and scheduler is self.warmup)

    def step(self, scheduler: LRSchedulerTypeUnion, metric: Any = None) -> None:
        """Step the schedule or the warm-up.

        Args:
            scheduler: one of the two.
            metric: what ``ReduceLROnPlateau`` watches.
        """
        groups = self.optimizer.param_groups
        known, added = groups[: self._count], groups[self._count :]
        self._take_off()
        before = float(known[0]["lr"]) * self._warmup_factor
        self.optimizer.param_groups = known
        try:
            scheduler.step(metric) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        finally:
            self.optimizer.param_groups = groups
        after = float(known[0]["lr"]) * self._warmup_factor
        self._put_on()
        for group in added:
            _set(group, group["lr"] * (after / before if before else 1))

    def step_finder(self, scheduler: LRSchedulerTypeUnion) -> None:
        """Step a scheduler that looks for a rate, so that groups have their factors while it looks."""
        scheduler.step()  # type: ignore[call-arg]
        for group in self.optimizer.param_groups:
            _set(group, group["lr"] * group.get("lr_scale", 1.0))

    def follow(self, schedulers: Sequence[Any]) -> None:
        """Give groups their factors in a schedule of weight averaging that a callback has put in place of this one.

        Args:
            schedulers: those in use. One with a rate per group is left as it is.
        """
        found = next((scheduler for scheduler in schedulers if isinstance(scheduler, SWALR)), None)
        if found is None or found is self._followed:
            return
        self._followed = found
        groups = self.optimizer.param_groups
        if len({group["swa_lr"] for group in groups}) == 1:
            for group in groups:
                group["swa_lr"] *= group.get("lr_scale", 1.0)

    def start_from(self, full: float) -> None:
        """Take a rate that was found as the full rate: schedule, warm-up and factors of groups act on it.

        Args:
            full: the rate, which somebody has written into every group.
        """
        if self.brings_rates:
            rank_zero_warn(
                f"{type(self.schedule).__name__} brings rates of its own, so that the rate that was found, {full:.4g}, "
                "is not used. Give it to the schedule, or take another schedule."
            )
        else:
            ratio = full / self.full
            for part in _parts(self.schedule):
                for name in ("base_lrs", "_last_lr"):
                    if hasattr(part, name):
                        setattr(part, name, [rate * ratio for rate in getattr(part, name)])
            for group in self.optimizer.param_groups[: self._count]:
                group["initial_lr"] = group["initial_lr"] * ratio
            self.planned = self.full
        for group, rate in zip(self.optimizer.param_groups[: self._count], self.schedule.get_last_lr(), strict=True):
            _set(group, rate)
        self._put_on()

    @property
    def _warmup_factor(self) -> float:
        return 1.0 if self.warmup is None else self.warmup.factor

    def _factor(self, group: dict[str, Any]) -> float:
        return self._warmup_factor * float(group.get("lr_scale", 1.0))

    def _put_on(self) -> None:
        """Multiply the rates of groups by their factors."""
        for group in self.optimizer.param_groups[: self._count]:
            _set(group, group["lr"] * self._factor(group))

    def _take_off(self) -> None:
        """Set the rates of groups to those of the schedule; what somebody else has written is divided by the factor."""
        for group, rate in zip(self.optimizer.param_groups[: self._count], self.schedule.get_last_lr(), strict=True):
            factor = self._factor(group)
            is_ours = factor == 0 or group["lr"] == rate * factor
            _set(group, rate if is_ours else group["lr"] / factor)


def _parts(schedule: Any) -> list[Any]:
    """Return a schedule and those that it is made of."""
    return [schedule, *(part for inner in getattr(schedule, "_schedulers", []) for part in _parts(inner))]


def _set(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):  # an optimizer in a CUDA graph reads this very tensor
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = float(rate)
