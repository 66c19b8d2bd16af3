"""Spatial group-wise enhance."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, reduced


@register_attention("sge")
class SpatialGroupEnhance(AttentionUnit):
    r"""Spatial attention per channel group, from the similarity of each position to the group's mean.

    For each of G groups: :math:`t = \sum_c x_c \mathrm{GAP}(x_c)`, normalised over the positions to zero mean and unit
    standard deviation, then :math:`\sigma(\gamma t + \beta)` with one :math:`\gamma` and :math:`\beta` per group.

    Args:
        channels: channels C of the features.
        groups: number of groups G; narrower features use one group per channel.

    Raises:
        ValueError: if ``groups`` does not divide ``channels``.

    Source:
        Li et al., "Spatial Group-wise Enhance", arXiv 1905.09646, equations 2 to 6; start values of the authors' code.

    Example:
        >>> import torch
        >>> attention_map, _ = SpatialGroupEnhance(128)(torch.randn(2, 128, 8, 8), None)
        >>> attention_map.shape
        torch.Size([2, 128, 8, 8])
    """

    def __init__(self, channels: int, groups: int = 64) -> None:
        super().__init__()
        self.groups = min(groups, reduced(channels, 1))
        if self.groups < 1 or channels % self.groups:
            raise ValueError(f"groups must divide the number of channels ({channels}), got {groups}.")
        self.weight = nn.Parameter(torch.zeros(self.groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(self.groups, 1, 1))

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return those before the sigmoid."""
        return self.parameters()

    def forward(self, features: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Return the map ``[B, C, H, W]`` in (0, 1) of ``features`` ``[B, C, H, W]``."""
        batch, channels, height, width = features.shape
        weighted = (features * features.mean((2, 3), keepdim=True)).reshape(batch, self.groups, -1, height, width)
        similarity = weighted.sum(2)  # [B, G, H, W]
        centred = similarity - similarity.mean((2, 3), keepdim=True)
        deviation = similarity.std((2, 3), keepdim=True, correction=min(1, height * width - 1))
        gate = torch.sigmoid(self.weight * (centred / (deviation + 1e-5)) + self.bias)
        return self.rescale(gate.repeat_interleave(channels // self.groups, dim=1), features), None
