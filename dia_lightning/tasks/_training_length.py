"""How long a training will be, as its trainer knows before it starts."""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dia_lightning.tasks._schedule import Unit


def training_length(trainer: Trainer) -> tuple[Unit, int | None]:
    """Return the unit that ends the training, and how many; ``None`` if neither epochs nor steps end it."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    has_epochs = epochs is not None and epochs >= 0
    if steps >= 0:
        steps_of_epochs = steps_in(trainer, epochs) if has_epochs and epochs is not None else None
        if steps_of_epochs is None or steps < steps_of_epochs:
            return "step", steps
    return "epoch", epochs if has_epochs else None


def steps_in(trainer: Trainer, epochs: int) -> int | None:
    """Return the number of optimizer steps of the first epochs; ``None`` if the data have no length."""
    trainer.fit_loop.setup_data()  # does nothing if the data are already loaded
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    changing = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    accumulated = (
        changing[0].get_accumulate_grad_batches(epoch) if changing else trainer.accumulate_grad_batches
        for epoch in range(epochs)
    )
    return sum(math.ceil(batches / each) for each in accumulated)
