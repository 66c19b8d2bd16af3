"""Dense-and-Implicit Attention: one attention module per stage, shared by its blocks, for any vision network.

Importing this package imports nothing heavy. `dia_lightning.check(model, example_input)` checks what holds on a network
with attention; take what you need from `dia_lightning.attention`, `dia_lightning.models`,
`dia_lightning.tasks`, `dia_lightning.datamodules` and `dia_lightning.callbacks`.
"""

from typing import TYPE_CHECKING, Any

from dia_lightning._version import __version__

if TYPE_CHECKING:
    from dia_lightning.attention import check as check

__all__ = ["__version__", "check"]


def __dir__() -> list[str]:
    return sorted([*globals(), "check"])


def __getattr__(name: str) -> Any:
    if name != "check":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dia_lightning.attention import check

    return check
