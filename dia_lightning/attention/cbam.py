"""Convolutional block attention module."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, reduced


@register_attention("cbam")
class CBAM(AttentionUnit):
    r"""Channel attention, then spatial attention on the result.

    Channel map :math:`M_c = \sigma(\mathrm{MLP}(\mathrm{avg}(x)) + \mathrm{MLP}(\max(x)))`; spatial map
    :math:`M_s = \sigma(\mathrm{BN}(\mathrm{conv}_{k \times k}([\max_c(M_c x), \mathrm{mean}_c(M_c x)])))`.
    The batch norm, slow as it is, is that of the authors' code, github.com/Jongchan/attention-module.

    Args:
        channels: channels C of the features.
        reduction: ratio of the MLP's bottleneck.
        kernel_size: odd width k of the spatial convolution.
        share_norm: whether blocks that share the unit also share its batch norm.

    Raises:
        ValueError: if ``kernel_size`` is even or not positive.

    Source:
        Woo et al., "CBAM", arXiv 1807.06521, equations 2 and 3.

    Example:
        >>> import torch
        >>> attention_map, _ = CBAM(64)(torch.randn(2, 64, 8, 8), None)
        >>> attention_map.shape
        torch.Size([2, 64, 8, 8])
    """

    start_value = 0.25  # two gates of 1/2
    norm: nn.BatchNorm2d

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7, share_norm: bool = False) -> None:
        super().__init__()
        hidden = reduced(channels, reduction)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd number, got {kernel_size}.")
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=0.01)
        self.share_norm = share_norm

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return those before the two sigmoids."""
        return (*self.expand.parameters(), *self.norm.parameters())

    def forward(self, features: Tensor, state: None = None, norm: nn.Module | None = None) -> tuple[Tensor, None]:
        """Return the map ``[B, C, H, W]`` in (0, 1) of ``features`` ``[B, C, H, W]``."""
        value = self._mlp(features.mean((2, 3))) + self._mlp(features.amax((2, 3)))  # [B, C]
        channel = torch.sigmoid(value)[:, :, None, None]
        gated = features * channel
        planes = torch.cat([gated.amax(1, keepdim=True), gated.mean(1, keepdim=True)], dim=1)  # [B, 2, H, W]
        spatial = torch.sigmoid((self.norm if norm is None else norm)(self.conv(planes)))  # [B, 1, H, W]
        return self.rescale(channel * spatial, features), None

    def _mlp(self, value: Tensor) -> Tensor:
        expanded: Tensor = self.expand(torch.relu(self.reduce(value)))
        return expanded
