"""How a callback makes a diffusion task generate images."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from dia_lightning.tasks import Sampler


@dataclass(frozen=True)
class Sampling:
    """Options of the task's ``sample``, for a callback.

    Args:
        steps: how often the network runs per image; for ``"ddim"`` and ``"ddpm"`` a divisor of the task's timesteps.
        guidance: weight of the class; 1 is none. A task without classes takes no other.
        sampler: ``"ddim"``, ``"ddpm"`` or ``"dpm++"``.
        seed: of the noise, 0 or more.

    Raises:
        ValueError: if the seed is negative.
    """

    steps: int
    guidance: float
    sampler: Sampler
    seed: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}. Use 0 for the usual noise.")

    def check(self, task: LightningModule, callback: str) -> None:
        """Refuse what could only fail after an epoch.

        Args:
            task: the running one.
            callback: name of the callback, for the message.

        Raises:
            ValueError: if the task makes no images, or the options do not fit it.
        """
        if not callable(getattr(task, "sample", None)):
            raise ValueError(
                f"{callback} needs a task with a method sample, which {type(task).__name__} has not. "
                "Use DiffusionTask, or leave the callback out."
            )
        try:
            self.denoising(task)
        except ValueError as error:
            raise ValueError(f"{callback}: {error}") from error

    def denoising(self, task: Any) -> Any:
        """Return what the task runs for these options."""
        return task.denoising(steps=self.steps, guidance=self.guidance, sampler=self.sampler, seed=self.seed)

    def images(self, task: Any, count: int, classes: list[int] | None, **options: Any) -> Tensor:
        """Return what the task makes, in [0, 1] and on the CPU; training keeps its random numbers."""
        with isolate_rng(), torch.no_grad():
            images: Tensor = task.sample(
                count,
                classes=classes,
                steps=self.steps,
                guidance=self.guidance,
                sampler=self.sampler,
                seed=self.seed,
                **options,
            )
        return images.float().cpu()

    def __str__(self) -> str:
        guidance = "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        return f"{self.steps} steps of {self.sampler}{guidance}"


def is_sharded(trainer: Trainer) -> bool:
    """Return whether every process has only a part of the weights, so that the network runs only in training steps."""
    return isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy))
