"""Checks of the first batch of a custom loader: what is wrong with its images and labels."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dia_lightning.tasks._targets import Target

Images: TypeAlias = Tensor | Sequence[Tensor]

_SCALE = "torchvision.transforms.v2.ToDtype(torch.float32, scale=True)"
_TOLERANCE = 0.01  # for resizing and rounding


def check_dtype(images: Images, network: nn.Module) -> None:
    """Refuse images that no network takes, without waiting for the device.

    Raises:
        ValueError: if images are not floating point, or float64 where the network is not.
    """
    if not len(images):
        return
    dtype = images[0].dtype
    if not dtype.is_floating_point:
        raise ValueError(f"The images are {dtype}, but networks take float32: add {_SCALE} to their transform.")
    weight = next((part for part in network.parameters() if part.is_floating_point()), None)
    if dtype == torch.float64 and weight is not None and weight.dtype != dtype:
        raise ValueError(f"The images are float64, but the network is {weight.dtype}: call .float() on them.")


def pixel_range(images: Images) -> tuple[float, float]:
    """Return the lowest and the highest value of images, waiting for the device once.

    Raises:
        ValueError: if one is NaN or infinite.
    """
    if not len(images):
        return 0.0, 0.0
    ends = torch.stack([torch.stack(image.aminmax()) for image in images])
    low, high = torch.stack([ends[:, 0].amin(), ends[:, 1].amax()]).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        first = int((~ends.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"Image {first} of the batch has pixels that are NaN or infinite. Repair or drop it.")
    return low, high


def not_symmetric(low: float, high: float) -> str | None:
    """Return a warning for images that should be in [-1, 1] but appear to be in another range."""
    if low >= 0 and high > 0:
        there, instead = "[0, 1]", "2 * images - 1"
    elif -0.5 <= low < -0.49 and 0.49 < high <= 0.5:
        there, instead = "[-0.5, 0.5]", "2 * images"
    else:
        return None
    return (
        f"The images of the first batch range from {low:.3g} to {high:.3g}, but DiffusionTask needs [-1, 1]. If they "
        f"are in {there}, pass {instead}, or set pixel_range='symmetric' in a data module of this package."
    )


def not_in_unit_range(low: float, high: float) -> str | None:
    """Return a warning for images that are not in [0, 1]."""
    if low >= -_TOLERANCE and high <= 1 + _TOLERANCE:
        return None
    way = f"add {_SCALE}" if low >= 0 else "remove the normalisation"
    return (
        f"The images of the first batch range from {low:.3g} to {high:.3g}, but DetectionTask needs [0, 1], since its "
        f"detector normalises them itself: {way}."
    )


def raw_pixels(images: Images, low: float, high: float) -> str | None:
    """Return a warning for images that look like integers from 0 to 255."""
    if low < 0 or not 15 < high <= 255 or not all(bool((image == image.round()).all()) for image in images):
        return None
    return (
        f"The images of the first batch are integers from {low:.0f} to {high:.0f}, like raw pixels, which networks "
        f"train badly on: add {_SCALE} and a normalisation to their transform."
    )


def class_numbers(labels: Tensor, num_classes: int, *, look: bool) -> Tensor:
    """Return labels ``[B]`` as int64.

    Args:
        labels: of a batch.
        num_classes: number of classes K.
        look: whether to check the values of the labels, which waits for the device.

    Raises:
        ValueError: if they are not integers ``[B]``, or not in 0..K - 1.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"The labels are {labels.dtype} of the shape {list(labels.shape)}, but must be one class number per image, "
            "int64 [B]" + (": call .long()." if labels.ndim == 1 else ": call .squeeze(1) or .argmax(1).")
        )
    labels = labels.long()
    if look or labels.device.type == "cpu":
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"The label {int(wrong[0])} is not in 0..{num_classes - 1} (num_classes={num_classes}). Count classes "
                "from 0, or raise num_classes."
            )
    return labels


def unusual_boxes(images: Images, targets: Sequence[Target]) -> str | None:
    """Return a warning for boxes that are not pixel corners within their images; waits for the device."""
    pairs = [(image, target["boxes"]) for image, target in zip(images, targets, strict=True) if len(target["boxes"])]
    if not pairs:
        return None
    ends = [boxes.amax(0) for _, boxes in pairs]
    if bool((torch.stack(ends) <= 1).all()):
        return (
            "All boxes of the first batch are in [0, 1], but DetectionTask needs pixels: multiply them by the width "
            "and height of their images."
        )
    for (image, boxes), end in zip(pairs, ends, strict=True):
        height, width = image.shape[-2:]
        if end[2] > width + 1 or end[3] > height + 1 or boxes.amin() < -1:
            return (
                f"A box of the first batch extends beyond its image of {width} x {height} pixels, to "
                f"{[round(value, 1) for value in end[2:].tolist()]}. Boxes must be (x1, y1, x2, y2) in pixels of the "
                "image they come with."
            )
    return None


def check_image_channels(images: Images, detector: nn.Module) -> None:
    """Refuse images that a torchvision detector cannot normalise.

    Raises:
        ValueError: if they are not ``[C, H, W]`` with as many channels as the detector has means, or one.
    """
    transform = getattr(detector, "transform", None)
    if not isinstance(transform, GeneralizedRCNNTransform):
        return
    channels = len(transform.image_mean)
    for image in images:
        if image.ndim != 3 or image.shape[0] not in (1, channels):
            raise ValueError(
                f"An image has the shape {list(image.shape)}, but the detector takes [{channels}, H, W]. Convert it, "
                'for example with PIL: image.convert("RGB").'
            )


@contextmanager
def naming_channels(network: nn.Module, images: Tensor) -> Iterator[None]:
    """Explain when a network fails because of the number of channels.

    Raises:
        ValueError: instead of the RuntimeError of a convolution.
    """
    try:
        yield
    except RuntimeError as error:
        first = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
        if first is None or images.ndim != 4 or images.shape[1] == first.in_channels:
            raise
        raise ValueError(
            f"The images have the shape {list(images.shape[1:])}, but the network takes {first.in_channels} channels, "
            "as (C, H, W). Change the data's channels, or the network's (timm: in_chans)."
        ) from error
