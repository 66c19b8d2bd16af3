"""Training samples whose order and augmentation depend only on the seed and their place.

Neither the number of workers, nor prefetching, nor an interruption of the training changes them.
"""

import os
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import Dataset, DistributedSampler

_SAMPLE, _BATCH, _LOADER = range(3)  # purposes of random numbers, so that no two of them share a stream
_NUMPY = np.random.MT19937()  # replaces the process's while a sample is loaded


class Draw(int):
    """The index of a training sample, and the key of the random numbers that augment it."""

    key: tuple[int, ...]  # seed, epoch, place in the epoch over all processes

    def __new__(cls, index: int, key: tuple[int, ...] = ()) -> "Draw":
        """Return an index drawn at a place."""
        draw = super().__new__(cls, index)
        draw.key = key
        return draw


class DrawnSample(tuple[Any, ...]):
    """A training sample that knows how it was drawn."""

    draw: Draw


def load_drawn(load: Callable[[int], tuple[Any, ...]], index: int) -> tuple[Any, ...]:
    """Load a sample with the random numbers of its draw, or those of the process if it is not a :class:`Draw`."""
    if not isinstance(index, Draw):
        return load(index)
    with _random_numbers(*index.key, _SAMPLE):
        sample = DrawnSample(load(index))
    sample.draw = index
    return sample


class DrawnCollate:
    """Collate with random numbers that depend on the draw of the first sample.

    Args:
        collate: makes a batch from a list of samples.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch."""
        if not isinstance(samples[0], DrawnSample):
            return self.collate(samples)
        with _random_numbers(*samples[0].draw.key, _BATCH):
            return self.collate(samples)


class DrawingSampler(DistributedSampler[Any]):
    """Base of the samplers of training data: the ranks share one draw per epoch, and each has its own part.

    Lightning keeps a ``DistributedSampler`` and sets its epoch. If nobody does, every pass over the data is the next
    epoch.

    Args:
        dataset: the training samples.
        num_replicas: number of processes.
        rank: of this process.
        seed: of the draws.
    """

    def __init__(self, dataset: Dataset[Any], *, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self._start = (0, 0)

    @abstractmethod
    def draw(self, generator: np.random.RandomState) -> npt.NDArray[np.int64]:
        """Return the samples of an epoch for all ranks ``[total_size]``."""

    def start_at(self, epoch: int, done: int) -> None:
        """Start with an epoch, and skip the number of samples that this process has seen of it.

        The length stays that of a whole epoch, because Lightning counts the skipped batches.
        """
        self._start = epoch, done
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        drawn = self.draw(np.random.RandomState([self.seed, epoch])).tolist()
        done = self._start[1] if epoch == self._start[0] else 0
        places = range(self.rank + done * self.num_replicas, self.total_size, self.num_replicas)
        return (Draw(drawn[place], (self.seed, epoch, place)) for place in places)


class ShuffledSampler(DrawingSampler):
    """Draw every training sample once per epoch; some twice if needed to give all ranks equally many."""

    def draw(self, generator: np.random.RandomState) -> npt.NDArray[np.int64]:
        """Return a permutation."""
        order: npt.NDArray[np.int64] = generator.permutation(len(self.dataset))  # type: ignore[arg-type]
        return np.resize(order, self.total_size)


def training_seed(processes: int) -> int:
    """Return the seed of ``seed_everything``, or else torch's; 0 if processes could not agree on one."""
    given = os.environ.get("PL_GLOBAL_SEED")
    if given is None:
        given = str(torch.initial_seed()) if processes == 1 else "0"
    return int(given) % 2**32  # as NumPy takes it


def loader_generator(seed: int, rank: int) -> torch.Generator:
    """Return a loader's own generator, so that iterating does not consume the network's random numbers."""
    return torch.Generator().manual_seed(_hash(seed, rank, _LOADER))


def _hash(*key: int) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little") % 2**63


@contextmanager
def _random_numbers(*key: int) -> Iterator[None]:
    """Seed torch (on the CPU), NumPy and Python from a key within the context."""
    states = torch.default_generator.get_state(), get_bit_generator(), random.getstate()
    set_bit_generator(_NUMPY)  # 20 times faster than getting and setting NumPy's state
    seed = _hash(*key)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators too
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        set_bit_generator(states[1])
        random.setstate(states[2])
