"""Base class of units with memory."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from dia_lightning.attention._gates import GatesOfChain, gates_of_chain
from dia_lightning.attention._unit import AttentionUnit, reduced


class RecurrentUnit(AttentionUnit):
    """Base class of units whose gates are the sum of two bottleneck MLPs, of the features' mean and the hidden state.

    Args:
        channels: channels C of the features.
        reduction: ratio of both bottlenecks, whose width is ``max(1, channels // reduction)``.
        gates: number of gates.
    """

    takes_mean = True

    def __init__(self, channels: int, reduction: int, gates: int) -> None:
        super().__init__()
        hidden = reduced(channels, reduction)
        self.input_reduce = nn.Linear(channels, hidden)
        self.input_expand = nn.Linear(hidden, gates * channels)
        self.hidden_reduce = nn.Linear(channels, hidden)
        self.hidden_expand = nn.Linear(hidden, gates * channels)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the layers that produce the gates."""
        return chain(self.input_expand.parameters(), self.hidden_expand.parameters())

    def _gates(self, value: Tensor, hidden: Tensor, *, is_first: bool) -> tuple[Tensor, GatesOfChain | None]:
        """Return the gates ``[B, gates * C]``, and what :func:`hand_on` needs for the next hidden state.

        Args:
            value: mean of the features ``[B, C]``.
            hidden: state from the previous block ``[B, C]``.
            is_first: whether this is the first block.
        """
        layers = (self.input_reduce, self.input_expand, self.hidden_reduce, self.hidden_expand)
        of_chain = gates_of_chain(layers, None if is_first else hidden)
        if of_chain is not None:
            return of_chain(value, hidden), of_chain
        gates: Tensor = self.input_expand(torch.relu(self.input_reduce(value)))
        return gates + self.hidden_expand(torch.relu(self.hidden_reduce(hidden))), None


def next_cell(cell: Tensor, i: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """Return the LSTM cell state that follows ``cell``, from gates before their activations."""
    return torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
