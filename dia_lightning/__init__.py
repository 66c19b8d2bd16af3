"""Dense-and-Implicit Attention: one attention module per stage, shared by its blocks, for any vision network.

Importing this package imports nothing heavy. `dia_lightning.attach(model, "dia-lstm")` attaches attention to a network,
`dia_lightning.detach(model)` removes it, and `dia_lightning.check(model, example_input)` checks what holds on a
network with attention; import the rest from `dia_lightning.attention`, `dia_lightning.models`, `dia_lightning.tasks`,
`dia_lightning.datamodules` and `dia_lightning.callbacks`.
"""

from typing import TYPE_CHECKING, Any

from dia_lightning._version import __version__

if TYPE_CHECKING:
    from dia_lightning.attention import attach as attach
    from dia_lightning.attention import check as check
    from dia_lightning.attention import detach as detach

_OF_ATTENTION = ("attach", "check", "detach")  # imported on demand: torch takes seconds

__all__ = ["__version__", "attach", "check", "detach"]


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_ATTENTION})


def __getattr__(name: str) -> Any:
    if name not in _OF_ATTENTION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dia_lightning import attention

    return getattr(attention, name)
