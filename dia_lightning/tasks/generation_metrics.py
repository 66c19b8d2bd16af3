"""Distances between generated and real images, by the features of a frozen network."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

_SUBSETS, _SUBSET_SIZE = 100, 1000  # of the kernel distance, as in the paper
_PARTS, _PART = 10, 10  # of the Inception score: how many, and the minimum number of images
_LOCAL: dict[str, Any] = {"sync_on_compute": False}  # features are already gathered from all processes


@dataclass(frozen=True)
class DescribedImages:
    """A network's outputs for a set of images.

    Args:
        features: ``[N, D]``.
        logits: ``[N, K]``.
        labels: true or requested class of each image ``[N]``; -1 where there is none.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


def frechet_distance(images: DescribedImages, reference: DescribedImages) -> float:
    """Return the squared Fréchet distance between normal distributions fitted to the features of two sets.

    It falls with the number of images even if both sets have the same origin: only compare sets of equal size. With
    Inception's features it is the FID, with any others it is not.

    Raises:
        ValueError: if a set has fewer than two images.

    Source:
        arXiv 1706.08500, equation 6; by torchmetrics.
    """
    _check_counts(images, reference)
    metric = FrechetInceptionDistance(_Given(images.features.shape[1]), **_LOCAL)
    metric.update(reference.features.double(), real=True)
    metric.update(images.features.double(), real=False)
    return float(metric.compute())


def kernel_distance(images: DescribedImages, reference: DescribedImages) -> tuple[float, float | None]:
    """Return mean and standard deviation of the kernel distance over 100 random subsets of 1000 images.

    With Inception's features it is the KID. Unlike the Fréchet distance, it does not depend on the number of images.
    Sets of up to 1000 images are compared as a whole, without a deviation.

    Raises:
        ValueError: if a set has fewer than two images.

    Source:
        arXiv 1801.01401; by torchmetrics.
    """
    _check_counts(images, reference)
    size = min(_SUBSET_SIZE, len(images.features), len(reference.features))
    subsets = _SUBSETS if min(len(images.features), len(reference.features)) > size else 1
    with _repeatable():
        given = _Given(images.features.shape[1])
        metric = KernelInceptionDistance(given, subsets=subsets, subset_size=size, **_LOCAL)
        metric.update(reference.features.double(), real=True)
        metric.update(images.features.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation) if subsets > 1 else None


def inception_score(images: DescribedImages) -> tuple[float, float | None]:
    """Return mean and standard deviation of the Inception score over 10 equal parts of the images.

    A part has at least ten images, so fewer than 100 images make fewer parts; a single part has no deviation. The score
    of a part is at most its number of images: below a few thousand images it says little.

    Raises:
        ValueError: if there are fewer than ten images.

    Source:
        arXiv 1606.03498; by torchmetrics.
    """
    if len(images.logits) < _PART:
        raise ValueError(f"The Inception score needs {_PART} images or more, got {len(images.logits)}.")
    parts = min(_PARTS, len(images.logits) // _PART)
    with _repeatable():
        metric = InceptionScore(_Given(images.logits.shape[1]), splits=parts, **_LOCAL)
        metric.update(images.logits[: len(images.logits) // parts * parts].double())
        mean, deviation = metric.compute()
    return float(mean), float(deviation) if parts > 1 else None


def class_agreement(images: DescribedImages) -> float:
    """Return the share of images, in [0, 1], that the network assigns to their intended class."""
    return float((images.logits.argmax(1) == images.labels).double().mean())


@contextmanager
def _repeatable() -> Iterator[None]:
    """Draw the same random subsets each time, and silence the warning that features are kept, which is intended."""
    with isolate_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.filterwarnings("ignore", message="Metric .* will save all extracted features")
        yield


class _Given(nn.Module):
    """Stands in for the network in a torchmetrics metric that gets features instead of images."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check_counts(*sets: DescribedImages) -> None:
    for images in sets:
        if len(images.features) < 2:
            raise ValueError(f"Comparing sets needs two or more images in each, got {len(images.features)}.")
