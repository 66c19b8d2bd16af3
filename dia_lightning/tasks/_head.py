"""The classifier of a network, and dropout before it."""

from collections.abc import Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def classifiers(network: nn.Module, left_out: Set[nn.Parameter] = frozenset()) -> list[nn.Module]:
    """Return the final layers of a network: several in distilled networks, none if there is no layer.

    Args:
        network: timm networks know their classifiers; in others, it is the last linear or convolutional layer.
        left_out: parameters of attention; its layers are not classifiers.
    """
    get: Any = getattr(network, "get_classifier", None)
    found = get() if callable(get) else None
    several = found if isinstance(found, tuple) else (found,)
    known = [module for module in several if isinstance(module, nn.Module) and any(True for _ in module.parameters())]
    outside = [layer for layer in _layers(network) if left_out.isdisjoint(layer.parameters())]
    return known or outside[-1:]


def _layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]


class DropoutLinear(nn.Linear):
    """A linear layer with dropout on its input during training."""

    dropout: float

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return super().forward(F.dropout(features, self.dropout, self.training))


def drop_before_head(network: nn.Module, outputs: int, dropout: float) -> None:
    """Add dropout to the input of the last linear layer or layers, in place.

    A layer remains the same object with the same weights and names; only its type becomes a subclass.

    Args:
        network: without attention yet, whose layers could come last.
        outputs: number of outputs of the network.
        dropout: probability in [0, 1).

    Raises:
        ValueError: if the probability is out of range, or the network does not end in a linear layer.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
    if dropout == 0:
        return
    heads = [layer for module in classifiers(network) for layer in _layers(module)[-1:]]
    wrong = [head for head in heads if type(head) is not nn.Linear or head.out_features != outputs]
    if wrong or not heads:
        raise ValueError(
            f"dropout={dropout} needs a network whose last layer is linear with {outputs} output(s), but that of "
            f"{type(network).__name__} is {wrong[0] if wrong else 'none'}. Use the network's own option: backbone_args."
        )
    for head in heads:
        head.__class__ = DropoutLinear
        head.dropout = dropout  # type: ignore[assignment]
