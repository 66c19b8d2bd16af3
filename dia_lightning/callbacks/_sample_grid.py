"""What pictures of some samples of an evaluation set have in common: which samples, and when they are drawn."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sized
from typing import Any, ClassVar, Generic, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

Sample = TypeVar("Sample")


class SampleGrid(Callback, ABC, Generic[Sample]):
    """Collect samples that are spread evenly over the validation or test set, and draw them at the end of the epoch.

    The samples are the same each time, so that the pictures of a run can be compared. In a distributed run they are
    samples of rank zero. The sanity check before training draws nothing.

    Args:
        num_images: number of images in the picture.
        every_n_epochs: draw after every n-th training epoch only.

    Raises:
        ValueError: if an argument is out of range.
    """

    _most_images: ClassVar[int]
    _readable_images: ClassVar[int]

    def __init__(self, *, num_images: int, every_n_epochs: int) -> None:
        if not 1 <= num_images <= self._most_images:
            raise ValueError(
                f"num_images must be from 1 to {self._most_images}, got {num_images}. "
                f"{self._readable_images} gives a readable picture."
            )
        if every_n_epochs < 1:
            raise ValueError(
                f"every_n_epochs must be 1 or more, got {every_n_epochs}. Use 1 to draw after every epoch."
            )
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self._spread: list[Sample] = []

    @abstractmethod
    def _collect(self, trainer: Trainer, batch: Any, outputs: Any, missing: int) -> None:
        """Add up to ``missing`` samples of a batch to ``self._spread``."""

    @abstractmethod
    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw what was collected; called on every rank, of which only rank zero has collected something."""

    def _forget(self) -> None:
        self._spread = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the images of the epoch before."""
        self._forget()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep some images of the batch."""
        if dataloader_idx > 0 or not trainer.is_global_zero or not self._draws_now(trainer):
            return
        batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        missing = self._missing((batch_idx + 1) / batches[0])
        later = _samples_later(trainer, batch_idx + 1)  # too few to take the rest from, if the last batch is small
        if later is not None:
            missing = max(missing, self.num_images - len(self._spread) - later)
        self._collect(trainer, batch, outputs, missing)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the images of this epoch."""
        if self._draws_now(trainer):
            self._log(trainer, pl_module, "test" if trainer.testing else "val")
            self._forget()

    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_end = on_test_batch_end
    on_validation_epoch_end = on_test_epoch_end

    def _draws_now(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        return trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _missing(self, progress: float) -> int:
        """Return how many images to take, so that the share that is there follows the share of batches that is done."""
        # an iterable dataset has no length and so no progress: its first images have to do
        target = self.num_images if progress == 0.0 else math.ceil(self.num_images * min(progress, 1.0))
        return max(0, target - len(self._spread))


def _samples_later(trainer: Trainer, seen: int) -> int | None:
    """Return how many samples come after so many batches; ``None`` where the loader does not tell."""
    batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    loader = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if size is None or not isinstance(sampler, Sized):
        return None
    return max(0, min(len(sampler), int(batches[0]) * int(size)) - seen * int(size))


def evenly(length: int, count: int) -> Tensor:
    """Return up to ``count`` different positions spread over ``range(length)``."""
    count = min(length, count)
    return torch.arange(count) * length // max(count, 1)


def when(trainer: Trainer) -> str:
    """Return the epoch, as it begins a title; nothing where there are no epochs."""
    return f"epoch {trainer.current_epoch}, " if trainer.state.fn == TrainerFn.FITTING else ""
