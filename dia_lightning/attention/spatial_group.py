"""Spatial group-wise enhance."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, beside, degrees_of_freedom, mean_over_positions, reduced


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
        self.weight = nn.Parameter(torch.empty(self.groups, 1, 1))
        self.bias = nn.Parameter(torch.empty(self.groups, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to zero and the biases to one, as the authors' code does."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters before the sigmoid."""
        return self.parameters()

    def forward(self, features: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Return the map ``[B, C, H, W]`` in (0, 1) of ``features`` ``[B, C, H, W]``."""
        channels, positions = features.shape[1], tuple(range(2, features.ndim))
        weighted = features * beside(mean_over_positions(features), features)
        grouped = weighted.reshape(features.shape[0], self.groups, channels // self.groups, *features.shape[2:])
        similarity = grouped.sum(2)  # [B, G, H, W]
        centred = similarity - similarity.mean(positions, keepdim=True)
        variance = centred.square().sum(positions, keepdim=True) / degrees_of_freedom(features)
        deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()  # whose gradient at zero is zero
        weight, bias = (beside(parameter.flatten()[None], features) for parameter in (self.weight, self.bias))
        gate = torch.sigmoid(weight * (centred / (deviation + 1e-5)) + bias)
        group = torch.arange(channels, device=gate.device) // (channels // self.groups)  # of each channel
        return self.rescale(gate.index_select(1, group), features), None
