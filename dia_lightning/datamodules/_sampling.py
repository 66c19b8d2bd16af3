"""Which samples are used: seeded splits, datasets that carry the index, and padding for distributed evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, default_collate
from torchvision.transforms import v2

from dia_lightning._apportion import apportion
from dia_lightning.datamodules._draws import DrawingSampler, load_drawn
from dia_lightning.datamodules._worker_notes import WorkerNotes
from dia_lightning.datamodules.sources import Source

Positions = npt.NDArray[np.int64]
Role = Literal["train", "eval", "predict"]


def _shuffled_by_class(labels: Positions, seed: int) -> list[Positions]:
    # NumPy's compatibility policy freezes RandomState's stream, so a split never changes.
    random = np.random.RandomState(seed)
    return [random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def stratified_split(
    labels: Positions, count: int, seed: int, *, leave_one: bool = False
) -> tuple[Positions, Positions]:
    """Draw ``count`` positions with the class proportions of ``labels``.

    Args:
        labels: of all positions.
        count: how many are drawn.
        seed: of the choice.
        leave_one: never draw all of a class, if ``count`` allows.

    Returns:
        The remaining and the drawn positions, both sorted; disjoint and together complete.
    """
    groups = _shuffled_by_class(labels, seed)
    sizes = np.array([len(group) for group in groups])
    counts = apportion(sizes, count)
    if leave_one and (counts == sizes).any() and count <= len(labels) - len(groups):
        counts = np.minimum(counts, sizes - 1)
        counts += apportion(sizes - 1 - counts, count - counts.sum())
    drawn = np.sort(np.concatenate([group[:n] for group, n in zip(groups, counts, strict=True)]))
    return np.setdiff1d(np.arange(len(labels)), drawn), drawn


def balanced_subset(labels: Positions, count: int, seed: int) -> Positions:
    """Choose up to ``count`` positions, cycling through the classes; a larger count includes the smaller ones."""
    groups = _shuffled_by_class(labels, seed)
    turns = np.concatenate([np.arange(len(group)) for group in groups])
    return np.sort(np.concatenate(groups)[np.argsort(turns, kind="stable")[:count]])


class SampleError(ValueError):
    """Raised if a sample cannot be loaded, for example because its file is damaged. The message names the file."""


class Samples(Dataset[tuple[Any, ...]], ABC):
    """One split, ready for a loader.

    A sample is ``(image, label)`` for the role ``"train"``, ``(image, label, index)`` for ``"eval"`` and
    ``(image, index)`` for ``"predict"``. Index -1 is the last sample, marked as padding.
    """

    def __init__(self, source: Source, positions: Positions, *, role: Role) -> None:
        self._source = source
        self._positions = positions
        self._role = role
        #: Notes of the latest loader's workers, if it has any.
        self.notes: WorkerNotes | None = None

    @abstractmethod
    def load(self, position: int) -> tuple[Any, Any]:
        """Return the transformed image and the label of a position of the source."""

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return load_drawn(self._sample, index)

    def _sample(self, index: int) -> tuple[Any, ...]:
        position = int(self._positions[index])
        if self.notes is not None:
            self.notes.begin(index)
        try:
            image, label = self.load(position)
        except (Exception, SystemExit) as error:  # a worker that exits with 0 would be waited for forever
            raise SampleError(
                f"Sample {index} ({self._source.name(position)}) cannot be loaded: {_sentence(error)}"
            ) from error
        if self.notes is not None:
            self.notes.end(index)
        if self._role == "train":
            return image, label
        return (image, label, index) if self._role == "eval" else (image, index)

    @property
    def labels(self) -> Positions:
        """Return the class index of every sample ``[N]``."""
        return self._source.labels[self._positions]

    def classes(self) -> set[int] | None:
        """Return which classes, as positions in ``class_names``, the samples have; ``None`` if unknown."""
        return set(np.unique(self.labels).tolist())

    @property
    def inodes(self) -> Positions:
        """Return a number per sample that two names of the same file share; empty if there are no files."""
        inodes = getattr(self._source, "inodes", None)
        return np.empty(0, dtype=np.int64) if inodes is None else inodes[self._positions]

    def name(self, index: int) -> str:
        """Return the path of a sample, or ``"split/position"``."""
        return self._source.name(self.position(index))

    def position(self, index: int) -> int:
        """Return the position of a sample in the source."""
        if not 0 <= index < len(self):
            raise IndexError(
                f"index must be in [0, {len(self)}), got {index}; -1 marks a padding sample without a name."
            )
        return int(self._positions[index])


class ClassificationSamples(Samples):
    """Images ``[C, H, W]`` and class indices."""

    def __init__(self, source: Source, positions: Positions, *, transform: v2.Transform, role: Role) -> None:
        super().__init__(source, positions, role=role)
        self._transform = transform

    def load(self, position: int) -> tuple[Tensor, int]:
        """Return the transformed image and its class."""
        return self._transform(self._source.image(position)), int(self._source.labels[position])


def _sentence(error: BaseException) -> str:
    text = str(error).rstrip(".")
    return f"{text}." if " " in text else f"{type(error).__name__} {text}".rstrip() + "."


class PaddedSampler(DistributedSampler[Any]):
    """Give every rank the same number of samples; padding has index -1.

    It is a ``DistributedSampler`` so that Lightning keeps it: Lightning's own repeats real samples, which are then
    counted twice.
    """

    def __init__(self, dataset: Samples, *, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self._length = len(dataset)

    def __iter__(self) -> Iterator[int]:
        for index in range(self.rank, self.total_size, self.num_replicas):
            yield index if index < self._length else -1


class BalancedSampler(DrawingSampler):
    """Draw training samples so that an epoch of the usual length has equally many of every class, up to one sample.

    Within an epoch the samples of a class come equally often too, up to one: those of rare classes several times, of
    frequent ones only some, chosen afresh for every epoch. Draws depend only on the seed and the epoch.

    Args:
        dataset: the training samples.
        num_replicas: number of processes.
        rank: of this process.
        seed: of the draws.
    """

    def __init__(self, dataset: Samples, *, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        labels = dataset.labels
        if labels.ndim > 1:
            raise ValueError(
                "sampling='balanced' needs one class per image, but these have several labels. Use 'shuffle'."
            )
        self._groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def draw(self, generator: np.random.RandomState) -> Positions:
        """Return equally many samples of every class, shuffled."""
        counts = np.full(len(self._groups), self.total_size // len(self._groups))
        counts[generator.permutation(len(counts))[: self.total_size - counts.sum()]] += 1
        drawn = [_repeated(group, count, generator) for group, count in zip(self._groups, counts, strict=True)]
        return generator.permutation(np.concatenate(drawn))


def _repeated(group: Positions, count: int, random: np.random.RandomState) -> Positions:
    """Return ``count`` positions: the whole group in random order as often as it fits, then part of it."""
    rounds = [random.permutation(group) for _ in range(-(-count // len(group)))]
    return np.concatenate([*rounds, group[:0]])[:count]


class MixingCollate:
    """Stack a training batch and mix it: mixup, cutmix, or one of the two at random.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 turns it off.
        cutmix: alpha of cutmix's Beta distribution; 0 turns it off.
        num_classes: length of the soft labels.
    """

    def __init__(self, *, mixup: float, cutmix: float, num_classes: int) -> None:
        mixes: list[v2.Transform] = []
        if mixup > 0:
            mixes.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            mixes.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
        self._mix = v2.RandomChoice(mixes)

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
        images, labels = self._mix(*default_collate(list(samples)))
        return images, labels
