"""The network of a task, and what it is tried on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

# The command line knows networks by name only: from the types of objects its help would list every module of torch.
if TYPE_CHECKING:
    Backbone: TypeAlias = str | nn.Module
else:
    Backbone = str


def images_like(network: nn.Module, shape: Sequence[int] | None) -> Tensor:
    """Return two images ``[2, C, H, W]`` on the meta device, of a shape (C, H, W), or of one that is usual."""
    channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), 3)
    return torch.empty(2, *(shape or (channels, 224, 224)), device="meta")
