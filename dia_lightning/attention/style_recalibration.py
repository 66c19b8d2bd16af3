"""Style-based recalibration."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, beside, degrees_of_freedom, mean_over_positions, reduced


@register_attention("srm")
class StyleRecalibration(AttentionUnit):
    r"""Channel attention from each channel's mean and standard deviation:
    :math:`\sigma(\mathrm{BN}(w_c \cdot [\mu_c, \sigma_c]))`, with two weights per channel.

    Args:
        channels: channels C of the features.
        share_norm: whether blocks that share the unit also share its batch norm.

    Source:
        Lee et al., "SRM: A Style-based Recalibration Module", arXiv 1903.10829, equations 1 to 4.

    Example:
        >>> import torch
        >>> attention_map, _ = StyleRecalibration(64)(torch.randn(2, 64, 8, 8), None)
        >>> attention_map.shape
        torch.Size([2, 64, 1, 1])
    """

    norm: nn.BatchNorm1d

    def __init__(self, channels: int, share_norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(reduced(channels, 1), 2))
        self.norm = nn.BatchNorm1d(channels)
        self.share_norm = share_norm
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to zero, as the authors' code does."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters before the sigmoid."""
        return self.weight, self.norm.bias  # the scale stays 1, else it would hold the weight at zero

    def forward(self, features: Tensor, state: None = None, norm: nn.Module | None = None) -> tuple[Tensor, None]:
        """Return the map ``[B, C, 1, 1]`` in (0, 1) of ``features`` ``[B, C, H, W]``."""
        mean = mean_over_positions(features)
        squares = (features - beside(mean, features)).square().flatten(2).sum(2)
        variance = squares / degrees_of_freedom(features)
        style = torch.stack([mean, (variance + 1e-5).sqrt()], dim=2)  # [B, C, 2]
        value = (self.norm if norm is None else norm)((style * self.weight).sum(2))  # [B, C]
        return self.rescale(beside(torch.sigmoid(value), features), features), None
