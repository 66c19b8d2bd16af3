"""Attention condenser."""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import AttentionUnit, choice, reduced


@register_attention("stac")
class AttentionCondenser(AttentionUnit):
    r"""Squeeze-and-excitation over a grid of p x p cells instead of one:
    :math:`\mathrm{up}(\sigma(W_2 \mathrm{ReLU}(W_1 P_p(x))))`.

    :math:`P_p` takes the mean of every cell, both layers mix all channels of all cells, and :math:`\mathrm{up}` gives
    every position the value of its cell. With ``size=1`` this is
    :class:`~dia_lightning.attention.SqueezeExcitation`, with the same weights.

    Args:
        channels: channels C of the features.
        reduction: ratio of the bottleneck, whose width is ``max(1, channels // reduction)``.
        size: number of cells p along each position axis. If an axis has fewer positions than cells, cells share them.
        spatial_dims: number of position axes, 2 or 3 (with a grid of p x p x p); tokens and sequences are a plane of
            width one.

    Raises:
        ValueError: if ``size`` is not a positive whole number, or ``spatial_dims`` neither 2 nor 3.

    Source:
        After STAC of Hryniowski and Wong, "Systematic Architectural Design of Scale Transformed Attention Condenser
        DNNs via Multi-Scale Class Representational Response Similarity Analysis", arXiv 2306.10128. Only its abstract
        was available and no code is public, so the formula and the defaults are this package's interpretation. The
        abstract reports up to twice the parameters for 1.7 % more FLOPs, which fits layers that run once, on the whole
        grid. Condensing, embedding and expanding positions is the idea of attention condensers, arXiv 2008.04245;
        public code for those, not by the authors, expands to the nearest cell.

    Example:
        >>> import torch
        >>> attention_map, _ = AttentionCondenser(64)(torch.randn(2, 64, 8, 8), None)
        >>> attention_map.shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, channels: int, reduction: int = 16, size: int = 2, spatial_dims: Literal[2, 3] = 2) -> None:
        super().__init__()
        hidden = reduced(channels, reduction)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a positive whole number, got {size!r}.")
        self.pool = choice(spatial_dims, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
        self.grid = (channels, *[size] * spatial_dims)
        self.size = size
        self.takes_mean = size == 1
        self.reduce = nn.Linear(channels * size**spatial_dims, hidden)
        self.expand = nn.Linear(hidden, channels * size**spatial_dims)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters before the sigmoid."""
        return self.expand.parameters()

    def forward(self, features: Tensor, state: None = None, mean: Tensor | None = None) -> tuple[Tensor, None]:
        """Return the map in (0, 1) of ``features`` ``[B, C, H, W]``.

        Args:
            features: ``[B, C, H, W]``.
            state: always ``None``.
            mean: of the features over all positions ``[B, C]``, if it is known; for ``size=1`` only.

        Returns:
            The map, ``[B, C, 1, 1]`` for ``size=1``, else ``[B, C, H, W]``, and ``None``.
        """
        cells = self.pool(features, self.size).flatten(1) if mean is None else mean  # [B, C * p * p]
        value = self.expand(torch.relu(self.reduce(cells)))
        attention_map = torch.sigmoid(value).reshape(features.shape[0], *self.grid)  # [B, C, p, p]
        if self.size > 1:
            attention_map = F.interpolate(attention_map, features.shape[2:])
        return self.rescale(attention_map, features), None
