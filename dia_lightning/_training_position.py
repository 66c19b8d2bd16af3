"""Where in its training data a trainer is."""

from typing import cast

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker


def training_position(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch that a training goes on in, and how many batches of it are done.

    Behind the last batch of an epoch that is the start of the next one, also before Lightning counts the epoch.
    """
    loop = trainer.fit_loop
    epochs = cast(_ProcessedTracker, loop.epoch_progress.current)
    if epochs.processed >= epochs.started:
        return epochs.processed, 0
    # `ready` and `completed` are one off within a batch
    batches = cast(_ProcessedTracker, loop.epoch_loop.batch_progress.current).processed
    return (epochs.processed + 1, 0) if batches >= loop.max_batches else (epochs.processed, batches)
