"""Class weights of the training loss: given, or computed from the class frequencies of the training data."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dia_lightning.tasks._batch_checks import class_numbers

ClassWeights: TypeAlias = list[float] | Literal["balanced"]


def without_arrays(weights: Any) -> Any:
    """Return weights as the command line gives them; scikit-learn gives an array."""
    return weights.tolist() if isinstance(weights, Tensor | np.ndarray) else weights


def check_class_weights(weights: Any, count: int, meaning: str) -> None:
    """Check the user's weights.

    Args:
        weights: as given.
        count: how many there must be.
        meaning: what they weigh, for the message.

    Raises:
        ValueError: if they are neither ``None``, ``"balanced"`` nor a list of ``count`` positive numbers.
    """
    if weights is None or weights == "balanced":
        return
    if not isinstance(weights, list | tuple) or not all(_is_positive(value) for value in weights):
        raise ValueError(f"class_weights must be 'balanced' or a list of positive numbers, got {weights!r}.")
    if len(weights) != count:
        raise ValueError(f"class_weights must have {count} number(s), {meaning}; got {len(weights)}.")


def balanced_weights(labels: Tensor, count: int, names: Sequence[str]) -> list[float]:
    """Return N / (K * count_k) for each of the K classes, like scikit-learn's ``compute_class_weight``.

    Args:
        labels: of all training images, ``[N]``, or class probabilities ``[N, K]``.
        count: the number of classes K.
        names: of the classes, for messages.

    Raises:
        ValueError: if the labels do not match the classes.
    """
    if labels.ndim == 1 and not labels.is_floating_point():
        images = torch.bincount(class_numbers(labels, count, look=True), minlength=count).double()
    elif labels.ndim == 2 and labels.shape[1] == count:
        images = labels.double().sum(0)
    else:
        raise ValueError(
            f"class_weights='balanced' needs a class index per training image, but the labels are "
            f"{list(labels.shape)} of {labels.dtype}. Give class_weights as a list of {count} numbers."
        )
    return told((images.sum() / (count * images)).tolist(), names, "no training image has")


def told(weights: list[float], names: Sequence[str], lack: str) -> list[float]:
    """Log the computed weights, and give 1 to classes that have none."""
    missing = [name for name, weight in zip(names, weights, strict=True) if not _is_positive(weight)]
    if missing:
        rank_zero_warn(
            f"class_weights='balanced': {lack} {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''} "
            f"({len(missing)} of {len(names)} classes), whose weight is 1. Look at the data, or at limit and val_split."
        )
    found = [weight if _is_positive(weight) else 1.0 for weight in weights]
    rank_zero_info(f"class_weights='balanced': {', '.join(f'{weight:.4g}' for weight in found[:100])}")
    return found


def training_labels(trainer: Trainer) -> Tensor:
    """Return the labels of all training samples of an epoch, without loading an image.

    Raises:
        ValueError: if the dataset does not provide them.
    """
    loader = trainer.train_dataloader
    labels = None
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:  # otherwise a sample may be a whole batch
        labels = _labels_of(loader.dataset)
        sampler = _sampler_of(loader)
        if labels is not None and isinstance(sampler, SubsetRandomSampler):
            labels = labels[list(sampler.indices)]
    if labels is None:
        kind = type(getattr(loader, "dataset", loader)).__name__
        raise ValueError(
            f"class_weights='balanced' needs the label of every training image, which {kind} does not provide. Give "
            "it an attribute `targets`, one label per image, or give class_weights as a list of numbers."
        )
    return labels


def warn_of_balanced_sampling(trainer: Trainer) -> None:
    """Warn if the data already make up for rare classes."""
    name = ""
    if getattr(getattr(trainer, "datamodule", None), "sampling", None) == "balanced":
        name = "sampling='balanced' of the data"
    elif isinstance(_sampler_of(trainer.train_dataloader), WeightedRandomSampler):
        name = "the WeightedRandomSampler of the loader"
    if name:
        rank_zero_warn(
            f"class_weights='balanced' and {name} both make up for rare classes, which then count too much. Omit one "
            "of them."
        )


def _sampler_of(loader: Any) -> Any:
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # Lightning wraps it in distributed runs


def _labels_of(data: Any) -> Tensor | None:
    if isinstance(data, Subset):
        inner = _labels_of(data.dataset)
        return None if inner is None else inner[list(data.indices)]
    if isinstance(data, ConcatDataset):
        parts = [_labels_of(part) for part in data.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(data, TensorDataset):
        return data.tensors[1] if len(data.tensors) > 1 else None
    if isinstance(data, list):
        return torch.as_tensor(np.asarray([sample[1] for sample in data]))
    for name in ("targets", "labels"):  # torchvision's names
        labels: Any = getattr(data, name, None)
        if hasattr(labels, "__len__") and len(labels) == len(data):
            transform = getattr(data, "target_transform", None)
            return torch.as_tensor(np.asarray(labels if transform is None else [transform(label) for label in labels]))
    return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
