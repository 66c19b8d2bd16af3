"""Squeeze-and-excitation."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, beside, mean_over_positions, reduced


@register_attention("se")
class SqueezeExcitation(AttentionUnit):
    r"""Channel attention from the spatial mean: :math:`\sigma(W_2 \mathrm{ReLU}(W_1 \mathrm{GAP}(x)))`.

    Args:
        channels: channels C of the features.
        reduction: ratio of the bottleneck, whose width is ``max(1, channels // reduction)``.

    Source:
        Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507, equations 2 and 3.

    Example:
        >>> import torch
        >>> attention_map, _ = SqueezeExcitation(64)(torch.randn(2, 64, 8, 8), None)
        >>> attention_map.shape
        torch.Size([2, 64, 1, 1])
    """

    takes_mean = True

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = reduced(channels, reduction)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters before the sigmoid."""
        return self.expand.parameters()

    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> tuple[Tensor, None]:
        """Return the map ``[B, C, 1, 1]`` in (0, 1) of ``features`` ``[B, C, H, W]``, whose ``mean`` may be known."""
        mean = mean_over_positions(features) if mean is None else mean
        value = self.expand(torch.relu(self.reduce(mean)))  # [B, C]
        return self.rescale(beside(torch.sigmoid(value), features), features), None
