"""From an image to a normalised tensor, with the requested augmentation."""

from collections.abc import Sequence
from typing import Literal

import torch
from torchvision.transforms import v2

Augment = Literal["none", "flips", "basic", "auto", "strong"]


def build_transform(
    augment: Augment,
    *,
    resize: Sequence[v2.Transform],
    basic: Sequence[v2.Transform],
    policy: v2.AutoAugmentPolicy,
    mean: Sequence[float],
    std: Sequence[float],
) -> v2.Transform:
    """Chain the steps of one augmentation level.

    Args:
        augment: ``"none"`` uses ``resize``, ``"flips"`` also flips half of the images; the others start with
            ``basic``. ``"auto"`` adds AutoAugment, ``"strong"`` adds RandAugment and, on the tensor, RandomErasing of a
            quarter of the images.
        resize: deterministic steps that bring any image to the network's size.
        basic: the standard training recipe of the data set, from an image to one of the network's size.
        policy: which AutoAugment policy.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].

    Returns:
        A transform from a PIL image to float32 ``[C, H, W]``.
    """
    steps = list(resize if augment in ("none", "flips") else basic)
    if augment == "flips":
        steps.append(v2.RandomHorizontalFlip())
    if augment == "auto":
        steps.append(v2.AutoAugment(policy))
    if augment == "strong":
        steps.append(v2.RandAugment())
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    if augment == "strong":
        steps.append(v2.RandomErasing(p=0.25))
    return v2.Compose(steps)
