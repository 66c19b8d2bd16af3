"""Options of the optimizer and its schedule, and optimizers by name."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.tasks._freezing import Freeze, check_freeze
from dia_lightning.tasks._parameter_groups import check_grouping


@dataclass(frozen=True)
class Options:
    """What :class:`~dia_lightning.tasks.DIATask` takes, under the same names.

    Raises:
        ValueError: if a number is out of its range, a name is unknown, or options do not go together.
    """

    optimizer: Literal["sgd", "adamw"] | OptimizerCallable
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    norm_weight_decay: bool
    attention_lr: float
    layer_decay: float
    freeze: Freeze
    schedule: Literal["step", "cosine", "constant"] | LRSchedulerCallable
    schedule_interval: Literal["epoch", "step"]
    schedule_frequency: int
    schedule_monitor: str | None
    milestones: Sequence[int]
    gamma: float
    warmup_epochs: int
    warmup_steps: int

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


def make_optimizer(options: Options, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> Optimizer:
    """Return the optimizer that the options name or make.

    Args:
        options: of the task.
        parameters: what is trained, in groups or not.
    """
    if not isinstance(options.optimizer, str):
        return options.optimizer(parameters)
    lr, weight_decay = float(options.lr), float(options.weight_decay)  # numbers of numpy would spoil a checkpoint
    if options.optimizer == "sgd":
        momentum, nesterov = float(options.momentum), options.nesterov
        return SGD(parameters, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    return AdamW(parameters, lr, weight_decay=weight_decay)
