"""From the options of a task to the schedules that Lightning steps."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerTypeUnion
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dia_lightning.tasks._schedule import Curve, NamedSchedule, Unit, Warmup
from dia_lightning.tasks._training_length import steps_in, training_length
from dia_lightning.tasks.optimization_options import OptimizationOptions


def make_schedule(
    options: OptimizationOptions, trainer: Trainer, optimizer: Optimizer
) -> tuple[LRSchedulerTypeUnion, Unit]:
    """Return the schedule that the options name or make, and the interval it is stepped by.

    Raises:
        ValueError: if it needs an unknown length of the training, or is not a torch schedule.
    """
    if isinstance(options.schedule, str):
        curve = planned_curve(options, options.schedule, trainer)
        return NamedSchedule(optimizer, curve), curve.unit
    schedule = options.schedule(optimizer)
    if not isinstance(schedule, LRScheduler | ReduceLROnPlateau):
        raise ValueError(f"schedule must return a torch LRScheduler, got a {type(schedule).__name__}.")
    return schedule, options.schedule_interval


def make_warmup(options: OptimizationOptions, optimizer: Optimizer) -> tuple[Warmup | None, Unit]:
    """Return the warm-up that multiplies the schedule, if any, and the interval it is stepped by.

    Source: torchvision, references/detection/engine.py, for the warm-up in steps
    """
    if options.warmup_steps > 0:
        return Warmup(optimizer, int(options.warmup_steps), 1e-3), "step"
    if options.warmup_epochs > 0 and not isinstance(options.schedule, str):  # named ones start after it
        return Warmup(optimizer, int(options.warmup_epochs), 1 / (options.warmup_epochs + 1)), "epoch"
    return None, "epoch"


def planned_curve(options: OptimizationOptions, name: str, trainer: Trainer) -> Curve:
    """Return the curve of a schedule by name, for the training's current length.

    Raises:
        ValueError: if it needs an unknown length of the training.
    """
    ends_by, length = training_length(trainer) if name == "cosine" else ("epoch", None)
    if name == "cosine" and length is None:
        raise ValueError(
            "schedule='cosine' needs trainer.max_epochs or trainer.max_steps to know where it ends, got neither."
        )
    by_step = options.schedule_interval == "step" or ends_by == "step"
    warmup: int | None = int(options.warmup_epochs)
    if by_step:
        warmup = steps_in(trainer, options.warmup_epochs) if options.warmup_epochs else 0
        if length is not None and ends_by == "epoch":
            length = steps_in(trainer, length)
    if warmup is None or (name == "cosine" and length is None):
        raise ValueError(
            f"schedule={name!r} is counted in steps here, but the number of steps per epoch is unknown. Set "
            "trainer.max_steps, and warmup_steps instead of warmup_epochs."
        )
    unit: Unit = "step" if by_step else "epoch"
    milestones = [int(time) for time in options.milestones]
    return Curve(name, unit, milestones, float(options.gamma), warmup, length)


def lightning_config(options: OptimizationOptions, schedule: LRSchedulerTypeUnion, interval: Unit) -> dict[str, Any]:
    """Return how Lightning steps a schedule.

    Raises:
        ValueError: if it lacks a monitor, or has one that it does not use.
    """
    monitor, frequency = options.schedule_monitor, options.schedule_frequency
    if not isinstance(schedule, ReduceLROnPlateau):
        if monitor is not None:
            raise ValueError(
                f"schedule_monitor is for ReduceLROnPlateau, but the schedule is {type(schedule).__name__}, got "
                f"{monitor!r}. Omit it."
            )
        # Lightning would count batches of an epoch, not optimizer steps
        return {"scheduler": schedule, "interval": interval, "frequency": 1 if interval == "step" else frequency}
    own = getattr(schedule, "monitor", None)  # of lightning.pytorch.cli.ReduceLROnPlateau
    if monitor is not None and own not in (None, monitor):
        raise ValueError(f"schedule_monitor is {monitor!r}, but ReduceLROnPlateau has {own!r}. Give one of them.")
    if monitor is None and own is None:
        raise ValueError(
            "ReduceLROnPlateau needs a metric to watch. Set schedule_monitor, for example to 'val/loss', or use "
            "lightning.pytorch.cli.ReduceLROnPlateau with monitor."
        )
    schedule.monitor = monitor or own  # type: ignore[attr-defined]
    return {
        "scheduler": schedule,
        "interval": interval,
        "frequency": frequency,
        "monitor": schedule.monitor,  # type: ignore[attr-defined]
        "strict": interval == "step",  # for epochs, on_train_epoch_end knows better which metrics may be missing
    }


def warn_of_long_warmup(trainer: Trainer, options: OptimizationOptions) -> None:
    """Warn if training ends within the warm-up, so the rate never reaches its full value."""
    epochs, steps = options.warmup_epochs, options.warmup_steps
    ends_by, length = training_length(trainer) if epochs or steps else ("epoch", None)
    rise = steps or epochs
    if length is not None and steps and ends_by == "epoch":
        ends_by, length = "step", steps_in(trainer, length)
    elif epochs and ends_by == "step":
        rise = steps_in(trainer, epochs) or 0
    if length is not None and length <= rise:
        rank_zero_warn(f"Training ends after {length} {ends_by}s, within the warm-up of {rise}.")


def warn_of_other_end(trained: Curve, planned: Curve) -> None:
    """Warn if a checkpoint's cosine does not end with the training."""
    if "cosine" == trained.name == planned.name and (trained.unit, trained.length) != (planned.unit, planned.length):
        option = "trainer.max_epochs is" if planned.unit == "epoch" else "training ends at step"
        rank_zero_warn(
            f"The cosine schedule of the checkpoint ends at {trained.unit} {trained.length}, but {option} "
            f"{planned.length}: lr is near 0 around the schedule's end and rises again after it. To train longer, "
            "start a new schedule from the weights: --model.init_from instead of --ckpt_path."
        )
