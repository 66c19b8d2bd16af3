"""Where in the training data a training goes on."""

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

    def compare(self, batch_size: int, trainer: Trainer) -> None:
        """Say that an epoch goes on in other batches, in which some samples come twice or never, or begins anew."""
        # Lightning's advice; the sampler goes on where the epoch was left
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
    """The part of a data module that knows where in its training data a training is."""

    batch_size: int
    _place: Place | None = None  # where a training goes on

    def state_dict(self) -> dict[str, Any]:
        """Return where in the training data a training is, for its checkpoint."""
        if self.trainer is None:
            return {}
        epoch, batches = training_position(self.trainer)
        place = Place(self.training_seed, epoch, batches, self.batch_size, self.trainer.world_size)
        return dataclasses.asdict(place)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the place of a checkpoint; only ``fit`` does."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        names = [field.name for field in dataclasses.fields(Place)]
        if not set(names) <= set(state_dict):  # of an older version
            return
        self._place = Place(**{name: state_dict[name] for name in names})  # subclasses add more
        self._place.compare(self.batch_size, self.trainer)

    @property
    def training_seed(self) -> int:
        """Seed of the order and the augmentation of training samples.

        It is that of ``seed_everything``, without it that of torch (0 with several processes); a training that goes on
        keeps the one that it began with.
        """
        return self._place.seed if self._place is not None else training_seed(replicas(self.trainer)[0])

    def placed_sampler(self, sampler: DistributedSampler[Any] | None, dataset: Samples) -> DistributedSampler[Any]:
        """Return what draws training samples from where training goes on.

        Args:
            sampler: what draws them from the start; ``None`` shuffles.
            dataset: of the training samples.
        """
        count, rank = replicas(self.trainer)
        if sampler is None:
            sampler = ShuffledSampler(dataset, num_replicas=count, rank=rank, seed=self.training_seed)
        # workers draw before Lightning tells the epoch, and a schedule may ask for the loader before it is restored
        now = (0 if self.trainer is None else self.trainer.current_epoch, 0)
        if isinstance(sampler, DrawingSampler):
            epoch, batches = now if self._place is None else max(now, (self._place.epoch, self._place.batches))
            sampler.start_at(epoch, batches * self.batch_size)
        return sampler


def training_position(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch that a training goes on in, and how many batches of it are done.

    Behind the last batch of an epoch that is the start of the next one, also before Lightning counts the epoch.
    """
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    if epochs.processed >= epochs.started:
        return epochs.processed, 0
    # `ready` and `completed` are one off within a batch
    batches: int = loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    return (epochs.processed + 1, 0) if batches >= loop.max_batches else (epochs.processed, batches)
