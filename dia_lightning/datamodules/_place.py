"""Where in the training data a training goes on."""

import warnings
from dataclasses import dataclass

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities import rank_zero_warn


@dataclass(frozen=True)
class Place:
    """What a checkpoint says of the training data.

    Args:
        seed: of the order and the augmentation.
        epoch: that goes on or begins.
        batches: of it that are done, by each process.
        batch_size: training samples per step and process.
        processes: that shared the data.
    """

    seed: int
    epoch: int
    batches: int
    batch_size: int
    processes: int

    def compare(self, batch_size: int, processes: int) -> None:
        """Say that an epoch goes on in other batches, in which some samples come twice or never."""
        # Lightning's advice; the sampler goes on where the epoch was left
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before", PossibleUserWarning)
        if self.batches and (self.batch_size, self.processes) != (batch_size, processes):
            rank_zero_warn(
                f"The checkpoint was written after {self.batches} batches of epoch {self.epoch} with batch_size="
                f"{self.batch_size} on {self.processes} process(es), now batch_size={batch_size} on {processes}: in "
                "this epoch some samples are seen twice or not at all. Keep both, or resume from the end of an epoch."
            )
