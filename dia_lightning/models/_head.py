"""Dropout before the classifier of any network."""

import torch
import torch.nn.functional as F
from torch import nn


class DropoutLinear(nn.Linear):
    """A linear layer that drops values of its input in training."""

    dropout: float

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return super().forward(F.dropout(features, self.dropout, self.training))


def drop_before_head(network: nn.Module, outputs: int, dropout: float) -> None:
    """Let the last linear layer drop values of its input in training, in place.

    The layer stays the object it is, with its weights and their names; only its type becomes a subclass.

    Args:
        network: without attention yet, whose layers could come last.
        outputs: of the network.
        dropout: probability in [0, 1).

    Raises:
        ValueError: if the probability is out of its range, or the network does not end in a linear layer.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
    if dropout == 0:
        return
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    head = layers[-1] if layers else network
    if type(head) is not nn.Linear or head.out_features != outputs:
        raise ValueError(
            f"dropout={dropout} needs a network whose last layer is a linear one with {outputs} output(s), but that of "
            f"{type(network).__name__} is {head if layers else 'none'}. Use an option of its own: backbone_args."
        )
    head.__class__ = DropoutLinear
    head.dropout = dropout  # type: ignore[assignment]
