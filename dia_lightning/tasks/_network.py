"""The network of a task, and its example input."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

# The command line takes networks only by name: for objects, its help would list every torch module.
if TYPE_CHECKING:
    Backbone: TypeAlias = str | nn.Module
else:
    Backbone = str


def images_like(network: nn.Module, shape: Sequence[int] | None) -> Tensor:
    """Return two images ``[2, C, H, W]`` on the meta device, of the given shape (C, H, W) or a usual one."""
    channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), 3)
    return torch.empty(2, *(shape or (channels, 224, 224)), device="meta")
