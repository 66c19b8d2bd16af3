"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR


def check_optimizer(name: str, *, lr: float, momentum: float, nesterov: bool, weight_decay: float) -> None:
    """Check the numbers of an optimizer when a task is made, long before it is used.

    Raises:
        ValueError: if the name is unknown or a number is out of its range.
    """
    if name not in ("sgd", "adamw"):
        raise ValueError(f"optimizer must be 'sgd', 'adamw' or a callable, got {name!r}.")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a positive number, got {lr}.")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be 0 or a positive number, got {weight_decay}.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
    if nesterov and (name != "sgd" or momentum == 0):
        raise ValueError(f"nesterov=True needs optimizer='sgd' and a momentum above 0, got {name!r} and {momentum}.")


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> Optimizer:
    """Return the named optimizer; ``momentum`` and ``nesterov`` are for SGD only."""
    if name == "sgd":
        return SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    return AdamW(parameters, lr=lr, weight_decay=weight_decay)


def make_schedule(
    optimizer: Optimizer,
    name: str,
    *,
    milestones: Sequence[int],
    gamma: float,
    warmup_epochs: int,
    max_epochs: int | None,
) -> LRScheduler:
    """Return the named schedule, to be stepped once per epoch.

    Args:
        optimizer: whose learning rate is scheduled.
        name: ``"step"`` multiplies the rate by ``gamma`` at each milestone, ``"cosine"`` lets it fall to 0 along half
            a cosine over the whole training, ``"constant"`` keeps it.
        milestones: epochs counted from 0, as the training loop counts them, warm-up included.
        gamma: factor at each milestone.
        warmup_epochs: epochs during which the rate rises linearly to its full value.
        max_epochs: length of the training; needed for ``"cosine"`` only.

    Raises:
        ValueError: if the length of the training is needed and not known.
    """
    if name == "step":
        main: LRScheduler = MultiStepLR(optimizer, [epoch - warmup_epochs for epoch in milestones], gamma)
    elif name == "cosine":
        if max_epochs is None:
            raise ValueError("schedule='cosine' needs trainer.max_epochs, to know where it ends, got none.")
        if max_epochs <= warmup_epochs:
            rank_zero_warn(f"Training ends after {max_epochs} epochs, within the warm-up of {warmup_epochs}.")
        main = CosineAnnealingLR(optimizer, max(1, max_epochs - warmup_epochs))
    else:
        main = MultiStepLR(optimizer, [])
    if warmup_epochs == 0:
        return main
    rise = LinearLR(optimizer, 1 / (warmup_epochs + 1), total_iters=warmup_epochs)
    return SequentialLR(optimizer, [rise, main], [warmup_epochs])


def make_step_warmup(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return a linear rise from a thousandth of the rate, to be stepped after every optimizer step.

    It multiplies what the schedule of epochs sets, and both start from the full rate.

    Source: torchvision, references/detection/engine.py
    """
    return LinearLR(optimizer, start_factor=1e-3, total_iters=steps)


def check_schedule(name: Any, milestones: Sequence[int], gamma: float, warmup_epochs: int, warmup_steps: int) -> None:
    """Check the numbers of a schedule when a task is made, long before it is used.

    Raises:
        ValueError: if the name is unknown or a number is out of its range.
    """
    if isinstance(name, str) and name not in ("step", "cosine", "constant"):
        raise ValueError(f"schedule must be 'step', 'cosine', 'constant' or a callable, got {name!r}.")
    if milestones is None:  # null in a config
        raise ValueError("milestones must be a list, got null. Write [] for none.")
    if list(milestones) != sorted(set(milestones)) or any(epoch < 1 for epoch in milestones):
        raise ValueError(f"milestones must be rising epochs of at least 1, got {list(milestones)}.")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}.")
    if warmup_epochs < 0 or (milestones and warmup_epochs >= milestones[0]):
        raise ValueError(f"warmup_epochs must be 0 or more and end before the first milestone, got {warmup_epochs}.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}.")
    if warmup_steps > 0 and warmup_epochs > 0:
        raise ValueError(f"Give warmup_epochs or warmup_steps, not both, got {warmup_epochs} and {warmup_steps}.")
    if name == "step" and not milestones:
        raise ValueError("schedule='step' needs milestones, the epochs at which lr is multiplied by gamma; got none.")
    if milestones and isinstance(name, str) and name != "step":
        raise ValueError(f"milestones are for schedule='step', but schedule={name!r}. Leave them out, or write [].")
