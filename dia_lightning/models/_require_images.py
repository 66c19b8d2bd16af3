"""The example input of a network."""

from torch import Tensor


def require_images(images: Tensor) -> None:
    """Refuse anything but a batch of images.

    Raises:
        ValueError: if the shape is not ``[B, C, H, W]``, or a size is 0.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images must be [B, C, H, W] with at least one image, got {list(images.shape)}.")
