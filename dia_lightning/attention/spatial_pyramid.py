"""Spatial pyramid attention."""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, beside, choice, reduced


@register_attention("spa")
class SpatialPyramidAttention(AttentionUnit):
    r"""Channel attention from means over 4 x 4, 2 x 2 and 1 x 1 grids:
    :math:`\sigma(W_2 \mathrm{ReLU}(W_1 [P_4(x), P_2(x), P_1(x)]))`.

    Args:
        channels: channels C of the features.
        reduction: ratio of the bottleneck, whose width is ``max(1, channels // reduction)``.
        spatial_dims: number of position axes, 2 or 3 (with grids of 4 x 4 x 4 and so on); tokens and sequences are a
            plane of width one.

    Source:
        Guo et al., "SPANet: Spatial Pyramid Attention Network", ICME 2020.

    Example:
        >>> import torch
        >>> attention_map, _ = SpatialPyramidAttention(64)(torch.randn(2, 64, 8, 8), None)
        >>> attention_map.shape
        torch.Size([2, 64, 1, 1])
    """

    def __init__(self, channels: int, reduction: int = 16, spatial_dims: Literal[2, 3] = 2) -> None:
        super().__init__()
        hidden = reduced(channels, reduction)
        means, self.pool = choice(
            spatial_dims, (16 + 4 + 1, F.adaptive_avg_pool2d), (64 + 8 + 1, F.adaptive_avg_pool3d)
        )
        self.reduce = nn.Linear(means * channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters before the sigmoid."""
        return self.expand.parameters()

    def forward(self, features: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Return the map ``[B, C, 1, 1]`` in (0, 1) of ``features`` ``[B, C, H, W]``."""
        pyramid = torch.cat([self.pool(features, size).flatten(1) for size in (4, 2, 1)], dim=1)  # [B, 21C]
        value = self.expand(torch.relu(self.reduce(pyramid)))  # [B, C]
        return self.rescale(beside(torch.sigmoid(value), features), features), None
