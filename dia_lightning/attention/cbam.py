"""Convolutional block attention module."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, beside, choice, mean_over_positions, reduced


@register_attention("cbam")
class CBAM(AttentionUnit):
    r"""Channel attention, then spatial attention on the result.

    Channel map :math:`M_c = \sigma(\mathrm{MLP}(\mathrm{avg}(x)) + \mathrm{MLP}(\max(x)))`; spatial map
    :math:`M_s = \sigma(\mathrm{BN}(\mathrm{conv}_{k \times k}([\max_c(M_c x), \mathrm{mean}_c(M_c x)])))`.
    The batch norm, though slow, is that of the authors' code, github.com/Jongchan/attention-module.

    Args:
        channels: channels C of the features.
        reduction: ratio of the MLP's bottleneck.
        kernel_size: odd width k of the spatial convolution.
        share_norm: whether blocks that share the unit also share its batch norm.
        spatial_dims: number of position axes, 2 or 3; tokens and sequences are a plane of width one.

    Raises:
        ValueError: if ``kernel_size`` is even or not positive, or ``spatial_dims`` neither 2 nor 3.

    Source:
        Woo et al., "CBAM", arXiv 1807.06521, equations 2 and 3.

    Example:
        >>> import torch
        >>> attention_map, _ = CBAM(64)(torch.randn(2, 64, 8, 8), None)
        >>> attention_map.shape
        torch.Size([2, 64, 8, 8])
    """

    start_value = 0.25  # two gates of 1/2
    norm: nn.BatchNorm2d | nn.BatchNorm3d

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        share_norm: bool = False,
        spatial_dims: Literal[2, 3] = 2,
    ) -> None:
        super().__init__()
        hidden = reduced(channels, reduction)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd number, got {kernel_size}.")
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        conv, norm = choice(spatial_dims, (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))
        self.conv = conv(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = norm(1, momentum=0.01)
        self.share_norm = share_norm

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters before the two sigmoids."""
        return (*self.expand.parameters(), *self.norm.parameters())

    def forward(self, features: Tensor, state: None = None, norm: nn.Module | None = None) -> tuple[Tensor, None]:
        """Return the map ``[B, C, H, W]`` in (0, 1) of ``features`` ``[B, C, H, W]``."""
        maximum = features.amax(tuple(range(2, features.ndim)))
        value = self._mlp(mean_over_positions(features)) + self._mlp(maximum)  # [B, C]
        channel = beside(torch.sigmoid(value), features)
        gated = features * channel
        planes = torch.cat([gated.amax(1, keepdim=True), gated.mean(1, keepdim=True)], dim=1)  # [B, 2, H, W]
        spatial = torch.sigmoid((self.norm if norm is None else norm)(self.conv(planes)))  # [B, 1, H, W]
        return self.rescale(channel * spatial, features), None

    def _mlp(self, value: Tensor) -> Tensor:
        expanded: Tensor = self.expand(torch.relu(self.reduce(value)))
        return expanded
