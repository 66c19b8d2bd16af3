"""What every attention module of the package has in common."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AttentionUnit(nn.Module):
    """Base class of the attention modules ("units") that :func:`~dia_lightning.attention.attach` shares.

    A unit maps features to an attention map: ``forward(features, state) -> (map, state)`` with features
    ``[B, C, H, W]`` and a map that broadcasts against them. Units without memory take and return ``None`` as state.

    A unit that contains a normalisation layer keeps it in :attr:`norm` and takes the keyword ``norm`` in ``forward``:
    when one unit serves several blocks and :attr:`share_norm` is false, every block passes a norm of its own, because
    running statistics shared among blocks would mix blocks whose statistics differ.
    """

    #: Value of every map entry after :meth:`start_at_identity` has zeroed the last layer, before rescaling.
    start_value: float = 0.5
    #: Whether all blocks that share the unit also share :attr:`norm`.
    share_norm: bool = True

    #: The unit's normalisation layer, if it has one.
    norm: nn.Module | None
    scale: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.norm = None
        self.register_buffer("scale", None)

    def start_at_identity(self) -> None:
        """Make every map exactly 1 until training moves it, so that attaching does not change a network.

        The parameters that feed the last activation are zeroed, which makes every map ``start_value``, and maps are
        rescaled by its inverse from now on. The factor is a buffer: a checkpoint of such a unit does not fit one that
        was built without it, instead of fitting and computing something else.

        Raises:
            ValueError: if the unit cannot produce a constant non-zero map.
        """
        if self.start_value == 0:
            raise ValueError(
                f"{type(self).__name__} cannot start at the identity: its map starts at 0 with this activation. "
                "Use activation='sigmoid' or identity=False."
            )
        for parameter in self.output_parameters():
            nn.init.zeros_(parameter)
        # A power of two in every unit, so that the product is exactly 1 in any floating-point format.
        self.scale = torch.tensor(1.0 / self.start_value)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return parameters that make every map ``start_value`` when zero, and can all leave zero in training."""
        raise NotImplementedError

    def rescale(self, attention_map: Tensor, features: Tensor) -> Tensor:
        """Apply the factor of :meth:`start_at_identity`, if any, and return the map in the features' dtype."""
        if self.scale is not None:
            attention_map = attention_map * self.scale
        return attention_map.to(features.dtype)

    def forward(self, features: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the attention map of ``features`` ``[B, C, H, W]`` and the state for the next block."""
        raise NotImplementedError


def reduced(channels: int, reduction: int) -> int:
    """Return the width of a bottleneck, ``max(1, channels // reduction)``; both must be positive."""
    if channels < 1:
        raise ValueError(f"channels must be a positive number, got {channels}.")
    if reduction < 1:
        raise ValueError(f"reduction must be a positive number, got {reduction}.")
    return max(1, channels // reduction)
