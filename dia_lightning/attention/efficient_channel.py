"""Efficient channel attention."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, beside, mean_over_positions, reduced


@register_attention("eca")
class EfficientChannelAttention(AttentionUnit):
    r"""Channel attention by a convolution along the channels: :math:`\sigma(\mathrm{conv}_k(\mathrm{GAP}(x)))`.

    Args:
        channels: channels C of the features.
        kernel_size: odd width k of the convolution. By default :math:`|\log_2(C) / 2 + 1/2|`
            truncated to a whole number, plus one if that is even, as in the authors' code.

    Raises:
        ValueError: if ``kernel_size`` is even or not positive.

    Source:
        Wang et al., "ECA-Net", arXiv 1910.03151, equations 9 and 12.

    Example:
        >>> EfficientChannelAttention(256).conv.kernel_size
        (5,)
    """

    takes_mean = True

    def __init__(self, channels: int, kernel_size: int | None = None) -> None:
        super().__init__()
        if kernel_size is None:
            width = int(abs(math.log2(reduced(channels, 1)) / 2 + 0.5))
            kernel_size = width if width % 2 else width + 1
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd number, got {kernel_size}.")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters before the sigmoid."""
        return self.conv.parameters()

    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> tuple[Tensor, None]:
        """Return the map ``[B, C, 1, 1]`` in (0, 1) of ``features`` ``[B, C, H, W]``, whose ``mean`` may be known."""
        mean = mean_over_positions(features) if mean is None else mean
        value = self.conv(mean[:, None])[:, 0]  # [B, 1, C] -> [B, C]
        return self.rescale(beside(torch.sigmoid(value), features), features), None
