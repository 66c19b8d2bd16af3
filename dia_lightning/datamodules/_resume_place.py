"""Where in the training data a training continues."""

import dataclasses
import warnings
from typing import Any

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler

from dia_lightning.datamodules._draws import DrawingSampler, ShuffledSampler, training_seed
from dia_lightning.datamodules._loader_processes import replicas
from dia_lightning.datamodules._sampling import Samples


@dataclasses.dataclass(frozen=True)
class Place:
    """The position in the training data that a checkpoint records.

    Args:
        seed: of the order and the augmentation.
        epoch: the one to continue or start.
        batches: how many of its batches each process has done.
        batch_size: training samples per step and process.
        processes: that shared the data.
    """

    seed: int
    epoch: int
    batches: int
    batch_size: int
    processes: int

    def compare(self, batch_size: int, trainer: Trainer) -> None:
        """Warn if an epoch continues with different batches, which repeat or miss samples, or starts over."""
        # Lightning's advice; the sampler continues where the epoch stopped
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before", PossibleUserWarning)
        processes, overfit = trainer.world_size, trainer.overfit_batches  # type: ignore[attr-defined]
        if self.batches and (self.batch_size, self.processes) != (batch_size, processes):
            rank_zero_warn(
                f"The checkpoint was written after {self.batches} batches of epoch {self.epoch} with batch_size="
                f"{self.batch_size} on {self.processes} process(es), now batch_size={batch_size} on {processes}: in "
                "this epoch some samples are seen twice or not at all. Keep both, or resume from the end of an epoch."
            )
        if self.batches and overfit:
            rank_zero_warn(
                f"overfit_batches={overfit} has an order of Lightning's own, so that epoch {self.epoch} begins anew "
                f"instead of after its batch {self.batches}. Resume from the end of an epoch to go on exactly."
            )


class PlacedData(LightningDataModule):
    """The part of a data module that tracks the position of a training in its data."""

    batch_size: int
    _place: Place | None = None  # where a training continues

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data, for the checkpoint."""
        if self.trainer is None:
            return {}
        epoch, batches = training_position(self.trainer)
        place = Place(self.training_seed, epoch, batches, self.batch_size, self.trainer.world_size)
        return dataclasses.asdict(place)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the place of a checkpoint; only ``fit`` does."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        names = [field.name for field in dataclasses.fields(Place)]
        if not set(names) <= set(state_dict):  # from an older version
            return
        self._place = Place(**{name: state_dict[name] for name in names})  # subclasses add more
        self._place.compare(self.batch_size, self.trainer)

    @property
    def training_seed(self) -> int:
        """Seed of the order and the augmentation of training samples.

        It is the seed of ``seed_everything``, or else torch's (0 with several processes); a resumed training keeps the
        one that it started with.
        """
        return self._place.seed if self._place is not None else training_seed(replicas(self.trainer)[0])

    def placed_sampler(self, sampler: DistributedSampler[Any] | None, dataset: Samples) -> DistributedSampler[Any]:
        """Return a sampler that draws training samples from where training continues.

        Args:
            sampler: draws them from the start; ``None`` shuffles.
            dataset: of the training samples.
        """
        count, rank = replicas(self.trainer)
        if sampler is None:
            sampler = ShuffledSampler(dataset, num_replicas=count, rank=rank, seed=self.training_seed)
        # workers draw before Lightning sets the epoch, and a schedule may request the loader before it is restored
        now = (0 if self.trainer is None else self.trainer.current_epoch, 0)
        if isinstance(sampler, DrawingSampler):
            epoch, batches = now if self._place is None else max(now, (self._place.epoch, self._place.batches))
            sampler.start_at(epoch, batches * self.batch_size)
        return sampler


def training_position(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch in which a training continues, and how many of its batches are done.

    After the last batch of an epoch that is the start of the next one, even before Lightning counts the epoch.
    """
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    if epochs.processed >= epochs.started:
        return epochs.processed, 0
    # `ready` and `completed` are off by one within a batch
    batches: int = loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    return (epochs.processed + 1, 0) if batches >= loop.max_batches else (epochs.processed, batches)
