"""Dense-and-Implicit Attention: one attention module per stage, shared by its blocks, for any vision network.

Importing this package imports nothing heavy; take what you need from `dia_lightning.attention`, `dia_lightning.models`,
`dia_lightning.tasks`, `dia_lightning.datamodules` and `dia_lightning.callbacks`.
"""

from dia_lightning._version import __version__

__all__ = ["__version__"]
