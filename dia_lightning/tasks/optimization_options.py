"""How a task is trained: optimizer, schedule, and what is frozen."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.tasks._freezing import Freeze, check_freeze
from dia_lightning.tasks._parameter_groups import check_grouping

OptimizerOption: TypeAlias = Literal["sgd", "adamw"] | OptimizerCallable
ScheduleOption: TypeAlias = Literal["step", "cosine", "constant"] | LRSchedulerCallable


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """How a task is trained.

    Args:
        optimizer: ``"sgd"``, ``"adamw"``, or a callable ``parameters -> Optimizer``, which ignores ``lr``,
            ``momentum``, ``nesterov`` and ``weight_decay``, except for a rate set by a learning-rate finder.
        lr: full learning rate, positive, to which schedule, warm-up and factors apply. A finder
            (``LearningRateFinder``, ``Tuner.lr_find``) writes here. A resumed run keeps that of its checkpoint.
        momentum: of SGD, in [0, 1).
        nesterov: whether SGD uses Nesterov momentum.
        weight_decay: applied to all parameters, including those of the attention.
        norm_weight_decay: whether norms and biases have weight decay too.
        attention_lr: learning-rate factor of the attention, 0 or more, whose parameters then form their own group.
        layer_decay: learning-rate factor in (0, 1] from each layer to the one before; the head has the full rate. A
            layer is a block of the backbone, or a module outside of blocks with the norms after it. The attention has
            the full rate, times ``attention_lr``.
        freeze: what not to train: patterns of parameter or module names, such as ``["backbone.layer1"]``, or
            ``"all-but-attention-and-head"``. Batch norms with frozen weights keep their statistics too. Nothing
            unfreezes these again, and parameters frozen by other means stay frozen.
        schedule: ``"step"``, ``"cosine"``, ``"constant"``, or a callable ``optimizer -> LRScheduler``; stepped per
            epoch. ``"cosine"`` ends with the training: if ``trainer.max_steps`` ends it, the cosine and the rise of
            ``warmup_epochs`` are stepped per optimizer step. It ignores ``trainer.max_time``.
        schedule_interval: ``"epoch"``, or ``"step"`` (optimizer step), then also the unit of milestones.
        schedule_frequency: a callable's schedule is stepped once every this many intervals.
        schedule_monitor: metric that ``ReduceLROnPlateau`` watches, for example ``"val/loss"``.
        milestones: epochs at which ``"step"`` multiplies the rate by ``gamma``.
        gamma: factor in (0, 1].
        warmup_epochs: epochs of linear rise before the schedule; a callable's schedule runs meanwhile.
        warmup_steps: optimizer steps of linear rise at the start, usual in detection and diffusion; the schedule runs
            meanwhile.

    Raises:
        ValueError: if a number is out of range, a name is unknown, or options conflict.

    Example:
        >>> OptimizationOptions(schedule="step", milestones=[30, 60], nesterov=True).lr
        0.1
    """

    optimizer: OptimizerOption = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    norm_weight_decay: bool = True
    attention_lr: float = 1.0
    layer_decay: float = 1.0
    freeze: Freeze = None
    schedule: ScheduleOption = "constant"
    schedule_interval: Literal["epoch", "step"] = "epoch"
    schedule_frequency: int = 1
    schedule_monitor: str | None = None
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_is_no_mark("optimizer", self.optimizer)
        check_is_no_mark("schedule", self.schedule)
        if isinstance(self.optimizer, str):
            self._check_optimizer(self.optimizer)
        check_grouping(self.attention_lr, self.layer_decay)
        check_freeze(self.freeze)
        self._check_milestones()
        self._check_warmup()
        self._check_stepping()

    def _check_optimizer(self, name: str) -> None:
        if name not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd', 'adamw' or a callable, got {name!r}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive number, got {self.lr}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be 0 or a positive number, got {self.weight_decay}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}.")
        if self.nesterov and (name != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov=True needs optimizer='sgd' and a positive momentum, got {name!r} and {self.momentum}."
            )

    def _check_milestones(self) -> None:
        name, milestones = self.schedule, self.milestones
        if isinstance(name, str) and name not in ("step", "cosine", "constant"):
            raise ValueError(f"schedule must be 'step', 'cosine', 'constant' or a callable, got {name!r}.")
        if milestones is None:  # null in a config
            raise ValueError("milestones must be a list, got null. Write [] for none.")
        if list(milestones) != sorted(set(milestones)) or any(epoch < 1 for epoch in milestones):
            raise ValueError(f"milestones must be increasing epochs of at least 1, got {list(milestones)}.")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}.")
        if name == "step" and not milestones:
            raise ValueError(
                "schedule='step' needs milestones, the epochs at which lr is multiplied by gamma; got none."
            )
        if milestones and isinstance(name, str) and name != "step":
            raise ValueError(f"milestones are for schedule='step', but schedule={name!r}. Omit them, or write [].")

    def _check_warmup(self) -> None:
        epochs, steps = self.warmup_epochs, self.warmup_steps
        if epochs < 0 or (self.milestones and epochs >= self.milestones[0]):
            raise ValueError(f"warmup_epochs must be 0 or more and end before the first milestone, got {epochs}.")
        if steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {steps}.")
        if steps > 0 and epochs > 0:
            raise ValueError(f"Give warmup_epochs or warmup_steps, not both, got {epochs} and {steps}.")
        if epochs > 0 and self.schedule == "step" and self.schedule_interval == "step":
            raise ValueError(f"Milestones in steps go with warmup_steps, not warmup_epochs, got {epochs}.")

    def _check_stepping(self) -> None:
        if self.schedule_interval not in ("epoch", "step"):
            raise ValueError(f"schedule_interval must be 'epoch' or 'step', got {self.schedule_interval!r}.")
        if self.schedule_frequency < 1:
            raise ValueError(f"schedule_frequency must be 1 or more, got {self.schedule_frequency}.")
        for name, default in (("schedule_frequency", 1), ("schedule_monitor", None)):
            value = getattr(self, name)
            if isinstance(self.schedule, str) and value != default:
                raise ValueError(f"{name} is for a callable, but schedule={self.schedule!r}, got {value!r}.")

    def make_optimizer(self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> Optimizer:
        """Return the optimizer that the options name or make, for parameters with or without groups."""
        if not isinstance(self.optimizer, str):
            return self.optimizer(parameters)
        lr, weight_decay = float(self.lr), float(self.weight_decay)  # numpy numbers would spoil a checkpoint
        if self.optimizer == "sgd":
            momentum, nesterov = float(self.momentum), self.nesterov
            return SGD(parameters, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        return AdamW(parameters, lr, weight_decay=weight_decay)
