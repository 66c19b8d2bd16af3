"""Factors between a schedule and the learning rates of an optimizer's groups."""

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
    """Multiplies a schedule's learning rates by group and warm-up factors, which the schedule never sees.

    So rates are right both for schedules that set them outright and for those that modify the current ones. Groups
    added to the optimizer later, such as those of Lightning's ``BackboneFinetuning``, are hidden from the schedule too,
    since many schedules cannot handle them, and rise and fall with the first group.

    Args:
        optimizer: its groups may have a factor, ``lr_scale``.
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
            group.setdefault("initial_lr", group["lr"])  # ReduceLROnPlateau does not set it
        self.brings_rates = float(optimizer.param_groups[0]["initial_lr"]) != full  # such as max_lr of OneCycleLR
        self.planned = self.full
        self._put_on()

    @property
    def full(self) -> float:
        """Rate of the first group without schedule and factors; after resuming, the checkpoint's."""
        return float(self.optimizer.param_groups[0]["initial_lr"])

    def has(self, scheduler: Any) -> bool:
        """Return whether a scheduler is the schedule or the warm-up, not one of a finder or a callback."""
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
        """Step the scheduler of a learning-rate finder, keeping the factors of groups during the search."""
        scheduler.step()  # type: ignore[call-arg]
        for group in self.optimizer.param_groups:
            _set(group, group["lr"] * group.get("lr_scale", 1.0))

    def follow(self, schedulers: Sequence[Any]) -> None:
        """Apply group factors to a weight-averaging schedule that a callback has substituted for this one.

        Args:
            schedulers: those in use. One with a rate per group is not changed.
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
        """Take the rate of a finder as the full rate, on which schedule, warm-up and group factors act.

        Args:
            full: the rate, already written into every group.
        """
        if self.brings_rates:
            rank_zero_warn(
                f"{type(self.schedule).__name__} sets its own rates, so the rate that was found, {full:.4g}, is "
                "not used. Pass it to the schedule, or use another schedule."
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
        """Set the groups' rates to the schedule's; rates written by others are divided by the factor."""
        for group, rate in zip(self.optimizer.param_groups[: self._count], self.schedule.get_last_lr(), strict=True):
            factor = self._factor(group)
            is_ours = factor == 0 or group["lr"] == rate * factor
            _set(group, rate if is_ours else group["lr"] / factor)


def _parts(schedule: Any) -> list[Any]:
    """Return a schedule and the schedules it consists of."""
    return [schedule, *(part for inner in getattr(schedule, "_schedulers", []) for part in _parts(inner))]


def _set(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):  # an optimizer in a CUDA graph reads this very tensor
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = float(rate)
