"""Distributions of a network's parameters and gradients."""

from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

Watch = Literal["gradients", "parameters", "all"]

BINS = 64


def histograms(network: nn.Module, what: Watch) -> dict[str, Any]:
    """Return a ``wandb.Histogram`` of each trainable parameter, of its gradient, or of both.

    The names are those of W&B's own ``watch``, ``gradients/<parameter>`` and ``parameters/<parameter>``, but there are
    no hooks in the network, which would travel along with its copies and slow down every backward pass.

    Args:
        network: the network, after a backward pass; before one there is nothing to see yet.
        what: which of the two, or ``"all"``.

    Example:
        >>> histograms(nn.Linear(2, 1), "all")
        {}
    """
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.grad is not None]
    found = {}
    for name, parameter in trained:
        if what != "parameters" and parameter.grad is not None:
            found[f"gradients/{name}"] = _histogram(parameter.grad)
        if what != "gradients":
            found[f"parameters/{name}"] = _histogram(parameter)
    return found


def _histogram(tensor: Tensor) -> Any:
    import wandb

    # in float32 numpy finds no room for the bins between weights that are all nearly 1, as those of norms are at first
    values = tensor.detach().double().cpu().numpy().ravel()
    return wandb.Histogram(np_histogram=np.histogram(values[np.isfinite(values)], bins=BINS))
