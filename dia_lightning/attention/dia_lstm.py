"""DIA-LSTM, the attention module of the DIA papers."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from dia_lightning._choices import check_choice
from dia_lightning.attention._gates import hand_on
from dia_lightning.attention._recurrent import RecurrentUnit, next_cell
from dia_lightning.attention._registry import register_attention
from dia_lightning.attention._unit import beside, mean_over_positions

#: Hidden and cell state, each ``[B, C]``, of every stacked cell.
LSTMState = tuple[tuple[Tensor, Tensor], ...]

_ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


@register_attention("dia-lstm")
class DIALSTM(RecurrentUnit):
    r"""Modified LSTM that steps once per block; its hidden state is the attention map.

    With :math:`y_t` the spatial mean of the features of block :math:`t` and :math:`h_0 = c_0 = 0`:

    .. math::
        (i, f, g, o) &= W_2^x \mathrm{ReLU}(W_1^x y_t) + W_2^h \mathrm{ReLU}(W_1^h h_{t-1}) \\
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \tanh(g) \\
        h_t &= \sigma(o) \sigma(c_t)

    All four linear layers have a bias. The maps of an untrained unit are near 1/4 on every channel. The first step
    runs on an explicit zero state, so that the hidden layers receive a gradient even if a stage has a single block.

    Args:
        channels: channels C of the features.
        reduction: ratio r of the bottleneck, whose width is ``max(1, channels // reduction)``.
        cells: number of stacked cells; cells above the first have full-width layers, as in the authors' code.
        activation: what turns the cell state into the hidden state: ``sigmoid`` in the paper, ``tanh`` as in a standard
            LSTM, or ``relu``. The paper's ablation; only ``sigmoid`` can start at the identity.
        dropout: probability of dropping an entry between two stacked cells, in [0, 1). No effect for ``cells=1``.

    Raises:
        ValueError: if a size is not positive, ``dropout`` is outside [0, 1), or ``activation`` is unknown.

    Source:
        arXiv 1905.10671, section "DIA-LSTM"; layer sizes and gate order from github.com/gbup-group/DIANet.

    Example:
        >>> import torch
        >>> unit = DIALSTM(64, reduction=4)
        >>> first, state = unit(torch.randn(2, 64, 8, 8), None)
        >>> second, state = unit(torch.randn(2, 64, 8, 8), state)
        >>> second.shape
        torch.Size([2, 64, 1, 1])
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        cells: int = 1,
        activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid",
        dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, reduction, gates=4)
        if cells < 1:
            raise ValueError(f"cells must be a positive number, got {cells}.")
        check_choice("activation", activation, _ACTIVATIONS)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        self.start_value = 0.25 if activation == "sigmoid" else 0.0
        self.activation = activation
        self.upper = nn.ModuleList(_UpperCell(channels) for _ in range(cells - 1))
        self.dropout = nn.Dropout(dropout)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that produce the gates of the last cell."""
        return self.upper[-1].parameters() if self.upper else super().output_parameters()

    def forward(
        self, features: Tensor, state: LSTMState | None = None, mean: Tensor | None = None
    ) -> tuple[Tensor, LSTMState]:
        """Step once.

        Args:
            features: ``[B, C, H, W]``.
            state: what the previous block of the stage returned; ``None`` at the first block.
            mean: of the features over all positions ``[B, C]``, if it is known.

        Returns:
            The map ``[B, C, 1, 1]``, in (0, 1) for ``activation="sigmoid"``, and the state for the next block.
        """
        value = mean_over_positions(features) if mean is None else mean  # [B, C]
        is_first = state is None
        if state is None:
            zero = torch.zeros_like(value)
            state = ((zero, zero),) * (1 + len(self.upper))
        hidden, cell = state[0]
        gates, of_chain = self._gates(value, hidden, is_first=is_first)
        states = [self._step(gates, cell)]
        hand_on(of_chain, states[0][0])
        for layer, (hidden, cell) in zip(self.upper, state[1:], strict=True):
            states.append(self._step(layer(self.dropout(states[-1][0]), hidden), cell))
        return self.rescale(beside(states[-1][0], features), features), tuple(states)

    def _step(self, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = gates.chunk(4, dim=1)  # [B, 4C] -> 4 x [B, C]
        cell = next_cell(cell, i, f, g)
        return torch.sigmoid(o) * _ACTIVATIONS[self.activation](cell), cell


class _UpperCell(nn.Module):
    """Gates of a stacked cell, from the hidden state of the cell below and its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Linear(channels, 4 * channels)
        self.hidden = nn.Linear(channels, 4 * channels)

    def forward(self, below: Tensor, hidden: Tensor) -> Tensor:
        gates: Tensor = self.input(below) + self.hidden(hidden)
        return gates
