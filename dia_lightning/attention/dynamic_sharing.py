"""Dynamic sharing unit, a DIA-LSTM without output gate."""

import torch
from torch import Tensor

from dia_lightning.attention._gates import hand_on
from dia_lightning.attention._recurrent import RecurrentUnit, next_cell
from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import beside, mean_over_positions


@register_attention("dsu")
class DynamicSharingUnit(RecurrentUnit):
    r"""Recurrent unit that steps once per block; the sigmoid of its cell state is the attention map.

    With :math:`y_t` the spatial mean of the features of block :math:`t` and :math:`h_0 = c_0 = 0`:

    .. math::
        (i, f, g) &= W_2^x \mathrm{ReLU}(W_1^x y_t) + W_2^h \mathrm{ReLU}(W_1^h h_{t-1}) \\
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \tanh(g) \\
        h_t &= \sigma(c_t)

    All four linear layers have a bias. The unit is :class:`~dia_lightning.attention.DIALSTM` with an output gate that
    is always open, at about three quarters of its size. The maps of an untrained unit are near 1/2 on every channel.

    Args:
        channels: channels C of the features.
        reduction: ratio of the bottleneck, whose width is ``max(1, channels // reduction)``; the authors' code has 4 on
            CIFAR and 16 on ImageNet.

    Raises:
        ValueError: if a size is not positive.

    Source:
        Wang et al., "Strengthening Layer Interaction via Dynamic Layer Attention", arXiv 2406.13392. The equations,
        layer sizes and order of the gates are those of the authors' code, github.com/tunantu/Dynamic-Layer-Attention.
        There the unit refreshes what layer attention reads from earlier blocks; gating the block it has just read, as
        DIA-LSTM does, is this package's own use.

    Example:
        >>> import torch
        >>> unit = DynamicSharingUnit(64)
        >>> first, state = unit(torch.randn(2, 64, 8, 8), None)
        >>> second, state = unit(torch.randn(2, 64, 8, 8), state)
        >>> second.shape
        torch.Size([2, 64, 1, 1])
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__(channels, reduction, gates=3)

    def forward(
        self, features: Tensor, state: tuple[Tensor, Tensor] | None = None, mean: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Step once.

        Args:
            features: ``[B, C, H, W]``.
            state: what the previous block of the stage returned; ``None`` at the first block.
            mean: of the features over all positions ``[B, C]``, if it is known.

        Returns:
            The map ``[B, C, 1, 1]`` in (0, 1), and the hidden and cell state, each ``[B, C]``, for the next block.
        """
        value = mean_over_positions(features) if mean is None else mean  # [B, C]
        hidden, cell = (torch.zeros_like(value),) * 2 if state is None else state
        gates, of_chain = self._gates(value, hidden, is_first=state is None)
        i, f, g = gates.chunk(3, dim=1)  # [B, 3C] -> 3 x [B, C]
        cell = next_cell(cell, i, f, g)
        hidden = torch.sigmoid(cell)
        hand_on(of_chain, hidden)
        return self.rescale(beside(hidden, features), features), (hidden, cell)
