"""The base class of the attention modules, and functions they share."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.attention._roles import Role, add_role


class AttentionUnit(nn.Module):
    """Base class of the attention modules ("units") that :func:`~dia_lightning.attention.attach` shares.

    A unit maps features to an attention map: ``forward(features, state) -> (map, state)`` with features
    ``[B, C, H, W]`` and a map of as many axes that broadcasts against them. Tokens and sequences come as
    ``[B, C, N, 1]``, volumes and video as ``[B, C, D, H, W]``. Units without memory take and return ``None`` as state.
    Where the features of a block differ in device or dtype from those before, they are moved to the unit, the map is
    moved back, and the state follows.

    ``forward`` must return its map through :meth:`rescale`, or the unit cannot start at the identity.

    A unit that only uses the mean over positions sets :attr:`takes_mean` and accepts the mean ``[B, C]`` as the keyword
    ``mean`` of ``forward``, instead of computing it; this way padded tokens can be left out. A subclass of such a unit
    whose ``forward`` lacks this keyword does not take the mean.

    A unit with a normalisation layer keeps it in :attr:`norm` and accepts the keyword ``norm`` in ``forward``: when one
    unit serves several blocks and :attr:`share_norm` is false, every block passes its own norm, because shared running
    statistics would mix blocks whose statistics differ.
    """

    #: Value of every map entry after :meth:`start_at_identity` has zeroed the last layer, before rescaling.
    start_value: float = 0.5
    #: Whether all blocks that share the unit also share :attr:`norm`.
    share_norm: bool = True
    #: Whether ``forward`` takes the keyword ``mean``.
    takes_mean: bool = False

    #: The unit's normalisation layer, if it has one.
    norm: nn.Module | None
    scale: Tensor | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.takes_mean and "forward" in vars(cls) and "takes_mean" not in vars(cls):
            cls.takes_mean = _takes_keyword(cls.forward, "mean")

    def __init__(self) -> None:
        super().__init__()
        self.norm = None
        self.register_buffer("scale", None)

    def start_at_identity(self) -> None:
        """Make every map exactly 1 until training moves it, so that attaching does not change a network.

        The parameters that feed the last activation are zeroed, which makes every map ``start_value``; from then on
        maps are rescaled by its inverse. The factor is a buffer, so loading a checkpoint of such a unit into one built
        without it fails instead of silently computing something else.

        Raises:
            ValueError: if the unit cannot produce a constant non-zero map, or has no :meth:`output_parameters`.
        """
        if self.start_value == 0:
            raise ValueError(
                f"{type(self).__name__} cannot start at the identity: its map starts at 0 with this activation. "
                "Use activation='sigmoid' or identity=False."
            )
        zero = {id(parameter) for parameter in self.output_parameters()}
        for module in self.modules():
            own = module.named_parameters(recurse=False, remove_duplicate=False)
            start_at_zero(module, [name for name, parameter in own if id(parameter) in zero])
        # A power of two in every unit, so that the product is exactly 1 in any floating-point format.
        self.scale = torch.tensor(1.0 / self.start_value)

    def reset_parameters(self) -> None:
        """Initialize the tensors that the unit itself holds, not those of its layers; ``to_empty`` needs this."""
        if self.scale is not None:
            self.scale.fill_(1.0 / self.start_value)

    def output_parameters(self) -> Iterable[nn.Parameter]:
        """Return parameters that make every map ``start_value`` when zero, and can all leave zero in training.

        Raises:
            ValueError: if the unit does not define it.
        """
        raise ValueError(
            f"identity=True needs {type(self).__name__}.output_parameters(), the parameters to set to zero."
        )

    def rescale(self, attention_map: Tensor, features: Tensor) -> Tensor:
        """Apply the factor of :meth:`start_at_identity`, if any, and return the map in the features' dtype."""
        if self.scale is not None:
            attention_map = attention_map * self.scale
        return attention_map.to(features.dtype)

    def forward(self, features: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the attention map of ``features`` ``[B, C, H, W]`` and the state for the next block."""
        raise NotImplementedError


def _takes_keyword(method: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return any(each.name == name or each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


class StartsAtZero(Role):
    """Role of a layer that initializes some of its parameters to zero, also on every reset."""

    rank = 4
    equals_plain = True
    dia_zeros: tuple[str, ...]

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # of the layer
        for name in self.dia_zeros:
            nn.init.zeros_(getattr(self, name))


def start_at_zero(module: nn.Module, names: Sequence[str]) -> None:
    """Set parameters of a module to zero, now and whenever it is reset."""
    if not names:
        return
    module.dia_zeros = tuple(names) if not isinstance(module, StartsAtZero) else (*module.dia_zeros, *names)  # type: ignore[assignment]
    add_role(module, StartsAtZero)
    for name in names:
        nn.init.zeros_(module.get_parameter(name))


def mean_over_positions(features: Tensor) -> Tensor:
    """Return the mean ``[B, C]`` of features ``[B, C, ...]``."""
    return features.mean(tuple(range(2, features.ndim)))


def degrees_of_freedom(features: Tensor) -> Tensor:
    """Return the number of positions of features ``[B, C, ...]`` minus one, but at least one."""
    positions = math.prod(features.shape[2:])
    return torch.full((), positions - 1, dtype=torch.float32, device=features.device).clamp_min(1)  # free in exports


def beside(values: Tensor, features: Tensor) -> Tensor:
    """Return values ``[B, C]`` in a shape ``[B, C, 1, ...]`` that broadcasts against features."""
    return values.reshape(*values.shape, *[1] * (features.ndim - 2))


def reduced(channels: int, reduction: int) -> int:
    """Return the width of a bottleneck, ``max(1, channels // reduction)``; both must be positive whole numbers."""
    if not isinstance(reduction, int):
        raise ValueError(f"reduction must be a whole number, got {reduction!r}.")
    if channels < 1:
        raise ValueError(f"channels must be a positive number, got {channels}.")
    if reduction < 1:
        raise ValueError(f"reduction must be a positive number, got {reduction}.")
    return max(1, channels // reduction)


def choice(spatial_dims: int, for_planes: Any, for_volumes: Any) -> Any:
    """Return what a unit needs for 2 or for 3 position axes."""
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    return for_planes if spatial_dims == 2 else for_volumes
