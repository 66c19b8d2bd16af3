"""Images and figures as pictures, in any size."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def to_picture(image: Tensor) -> Image.Image:
    """Return an image as an RGB picture of the same size.

    Args:
        image: ``[C, H, W]`` on the CPU, in [0, 1] (other values are clipped, NaN is black) or of 8 bits. Of one
            channel, or of channels without a colour of their own, the picture is grey.

    Example:
        >>> import torch
        >>> to_picture(torch.ones(1, 2, 3)).size
        (3, 2)
        >>> to_picture(torch.tensor([0.0, 0.5, 2.0]).view(3, 1, 1)).getpixel((0, 0))
        (0, 128, 255)
    """
    if not image.is_floating_point():
        image = image / 255
    if image.shape[0] != 3:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    levels = (image.nan_to_num().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def scaled(picture: Image.Image, scale: float, resampling: Image.Resampling) -> Image.Image:
    """Return a picture in another size, of at least one pixel."""
    return picture.resize((max(1, round(scale * picture.width)), max(1, round(scale * picture.height))), resampling)


def as_image(picture: Image.Image | Figure) -> Image.Image:
    """Return a picture, or the pixels of a figure that was made without pyplot, as an RGB image."""
    if not isinstance(picture, Figure):
        return picture.convert("RGB")
    canvas = FigureCanvasAgg(picture)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
