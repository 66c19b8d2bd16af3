"""Augmentation of images together with the boxes and masks of their objects."""

from typing import Any, Literal

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

DetectionAugment = Literal["none", "hflip", "flips", "lsj", "ssd"]

# Padding has ImageNet's mean colour, as in torchvision's detection references; masks are 0 there.
_FILL: dict[type | str, Any] = {tv_tensors.Image: (123, 117, 104), "others": 0}
_LSJ_SIZE = (1024, 1024)


def build_detection_transform(augment: DetectionAugment) -> v2.Transform:
    """Chain the steps of one augmentation level, as in torchvision's detection references.

    Args:
        augment: ``"none"``: nothing. ``"hflip"``: half of the images mirrored. ``"flips"``: also upside down.
            ``"lsj"``: large scale jitter, 0.1 to 2 times what fits into 1024 x 1024, then cropped or padded to that
            size, and mirrored. ``"ssd"``: colours changed, image placed on a larger canvas, cropped to a part with
            objects, and mirrored.

    Returns:
        A transform of an 8-bit image and a target with ``boxes``, ``labels`` and perhaps ``masks``. It returns float32
        in [0, 1] and plain tensors. Moved boxes are clipped to the image, and those of about a pixel or less dropped
        together with their labels and masks.
    """
    steps = _steps(augment)
    if steps:
        steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def _steps(augment: DetectionAugment) -> list[v2.Transform]:
    mirror = v2.RandomHorizontalFlip()
    if augment == "none":
        return []
    if augment == "hflip":
        return [mirror]
    if augment == "flips":
        return [mirror, v2.RandomVerticalFlip()]
    if augment == "lsj":
        return [v2.ScaleJitter(_LSJ_SIZE), v2.RandomCrop(_LSJ_SIZE, pad_if_needed=True, fill=_FILL), mirror]
    return [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=_FILL), v2.RandomIoUCrop(), mirror]
