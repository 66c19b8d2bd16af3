"""Attention modules by name."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from dia_lightning._choices import did_you_mean, near

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_attention(name: str) -> Callable[[Builder], Builder]:
    """Register an attention module, or a function that builds one, under a name for ``attach`` and the command line.

    Args:
        name: what users write, for example ``"se"``.

    Returns:
        A decorator that returns its argument unchanged. The first argument of the builder is ``channels``.

    Raises:
        ValueError: if the name is taken.

    Example:
        >>> from functools import partial
        >>> from dia_lightning.attention import SqueezeExcitation, list_attention, register_attention
        >>> wide = register_attention("wide-se")(partial(SqueezeExcitation, reduction=2))
        >>> "wide-se" in list_attention()
        True
    """

    def register(builder: Builder) -> Builder:
        if name in _BUILDERS:
            raise ValueError(f"An attention module named {name!r} is already registered: {_BUILDERS[name]!r}.")
        _BUILDERS[name] = builder
        return builder

    return register


def list_attention() -> list[str]:
    """Return the names of the registered attention modules.

    Example:
        >>> list_attention()[:3]
        ['cbam', 'dia-lstm', 'dsu']
    """
    return sorted(_BUILDERS)


def attention_builder(attention: str | Callable[..., nn.Module], arguments: dict[str, Any]) -> Callable[..., nn.Module]:
    """Return a function ``(channels, spatial_dims=2) -> unit``; the second goes to units that take it.

    Args:
        attention: a registered name, or a callable whose first argument is ``channels``.
        arguments: further keyword arguments of the unit.

    Raises:
        ValueError: if the name is unknown, or the unit takes no such argument.

    Example:
        >>> attention_builder("se", {"reduction": 8})(64).reduce.out_features
        8
    """
    if isinstance(attention, nn.Module):
        raise ValueError(
            f"Attention is a module instance ({type(attention).__name__}), but stages differ in width. "
            "Pass its class, or a function channels -> nn.Module."
        )
    if not (isinstance(attention, str) or callable(attention)):
        raise ValueError(f"Unknown attention {attention!r}: give a name or a callable channels -> nn.Module.")
    builder = _named(attention) if isinstance(attention, str) else attention
    try:
        inspect.signature(builder).bind(1, **arguments)
    except TypeError as error:
        accepted = ", ".join(list(inspect.signature(builder).parameters)[1:]) or "none"
        raise ValueError(f"Attention {attention!r}: {error}. Its arguments are: {accepted}.") from None
    if "spatial_dims" in inspect.signature(builder).parameters:
        return lambda channels, spatial_dims=2: builder(channels, **{"spatial_dims": spatial_dims, **arguments})
    return lambda channels, spatial_dims=2: builder(channels, **arguments)


def _named(name: str) -> Callable[..., nn.Module]:
    if name in _BUILDERS:
        return _BUILDERS[name]
    if "." in name:
        kind = name.rpartition(".")[2]
        raise ValueError(
            f"Attention {name!r} is not registered, and paths are not imported, as they may come from a checkpoint. "
            f"Give the class itself, attention={kind}, or register it first: register_attention({name!r})({kind}); the "
            "command line does so for names in a config or an option."
        )
    names = list_attention()
    raise ValueError(
        f"Unknown attention {name!r}.{did_you_mean(near(name, names, likeness=0.3))} Known: {', '.join(names)}."
    )
