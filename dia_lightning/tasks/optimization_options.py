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
        optimizer: ``"sgd"``, ``"adamw"``, or a callable ``parameters -> Optimizer``, which then ignores ``lr``,
            ``momentum``, ``nesterov`` and ``weight_decay``, but for a rate that a learning-rate finder has found.
        lr: full learning rate, positive, that schedule, warm-up and factors act on. A finder (``LearningRateFinder``,
            ``Tuner.lr_find``) writes here. A resumed run keeps that of its checkpoint.
        momentum: of SGD, in [0, 1).
        nesterov: whether SGD uses Nesterov momentum.
        weight_decay: applied to all parameters, those of the attention included.
        norm_weight_decay: whether norms and biases have weight decay too.
        attention_lr: factor of the rate of the attention, 0 or more; its parameters are a group of their own then.
        layer_decay: factor in (0, 1] of the rate from each layer to the one before; the head has the full rate. A layer
            is a block of the backbone, or what stands outside of blocks with the norms after it. The attention has
            the full rate, times ``attention_lr``.
        freeze: what is not trained: patterns of names of parameters or modules, such as ``["backbone.layer1"]``, or
            ``"all-but-attention-and-head"``. Batch norms whose weights are frozen keep their statistics too. Nothing
            unfreezes it again, and what is frozen by other means stays so.
        schedule: ``"step"``, ``"cosine"``, ``"constant"``, or a callable ``optimizer -> LRScheduler``; stepped per
            epoch. ``"cosine"`` ends with the training: if ``trainer.max_steps`` ends it, the cosine is stepped, and
            ``warmup_epochs`` rise, per optimizer step. It does not know of ``trainer.max_time``.
        schedule_interval: ``"epoch"``, or ``"step"``, an optimizer step, which milestones count then too.
        schedule_frequency: a callable's schedule is stepped once in so many intervals.
        schedule_monitor: metric that ``ReduceLROnPlateau`` watches, for example ``"val/loss"``.
        milestones: epochs at which ``"step"`` multiplies the rate by ``gamma``.
        gamma: factor in (0, 1].
        warmup_epochs: epochs of linear rise before the schedule; that of a callable goes on meanwhile.
        warmup_steps: optimizer steps of linear rise at the start, usual in detection and diffusion; the schedule goes
            on meanwhile.

    Raises:
        ValueError: if a number is out of its range, a name is unknown, or options do not go together.

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
                f"nesterov=True needs optimizer='sgd' and a momentum above 0, got {name!r} and {self.momentum}."
            )

    def _check_milestones(self) -> None:
        name, milestones = self.schedule, self.milestones
        if isinstance(name, str) and name not in ("step", "cosine", "constant"):
            raise ValueError(f"schedule must be 'step', 'cosine', 'constant' or a callable, got {name!r}.")
        if milestones is None:  # null in a config
            raise ValueError("milestones must be a list, got null. Write [] for none.")
        if list(milestones) != sorted(set(milestones)) or any(epoch < 1 for epoch in milestones):
            raise ValueError(f"milestones must be rising epochs of at least 1, got {list(milestones)}.")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}.")
        if name == "step" and not milestones:
            raise ValueError(
                "schedule='step' needs milestones, the epochs at which lr is multiplied by gamma; got none."
            )
        if milestones and isinstance(name, str) and name != "step":
            raise ValueError(f"milestones are for schedule='step', but schedule={name!r}. Leave them out, or write [].")

    def _check_warmup(self) -> None:
        epochs, steps = self.warmup_epochs, self.warmup_steps
        if epochs < 0 or (self.milestones and epochs >= self.milestones[0]):
            raise ValueError(f"warmup_epochs must be 0 or more and end before the first milestone, got {epochs}.")
        if steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {steps}.")
        if steps > 0 and epochs > 0:
            raise ValueError(f"Give warmup_epochs or warmup_steps, not both, got {epochs} and {steps}.")
        if epochs > 0 and self.schedule == "step" and self.schedule_interval == "step":
            raise ValueError(f"Milestones in steps go with warmup_steps, not with warmup_epochs, got {epochs}.")

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
        """Return the optimizer that the options name or make, of parameters in groups or not."""
        if not isinstance(self.optimizer, str):
            return self.optimizer(parameters)
        lr, weight_decay = float(self.lr), float(self.weight_decay)  # numbers of numpy would spoil a checkpoint
        if self.optimizer == "sgd":
            momentum, nesterov = float(self.momentum), self.nesterov
            return SGD(parameters, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        return AdamW(parameters, lr, weight_decay=weight_decay)
