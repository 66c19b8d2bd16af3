"""A network whose attention maps are given."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dia_lightning.analysis import MapRecorder
from dia_lightning.attention import attach

Maps: TypeAlias = npt.NDArray[np.float64]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.end = nn.BatchNorm2d(channels, dtype=torch.float64)

    def forward(self, features: Tensor) -> Tensor:
        branch: Tensor = self.end(features)
        return features + branch


class Script(nn.Module):
    """A unit that reads its maps from a script: one per call, ``[B, C]`` each."""

    maps: list[Tensor]

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, features: Tensor, state: Any) -> tuple[Tensor, Any]:
        return Script.maps.pop(0)[:, :, None, None], None


def scripted_network(layers: int, channels: int) -> nn.Module:
    return attach(nn.Sequential(*(Block(channels) for _ in range(layers))), Script, sites=["*.end"])


def play(network: nn.Module, maps: Maps) -> None:
    """Run a scripted network on images with these maps ``[B, L, C]``."""
    Script.maps = list(torch.from_numpy(maps).unbind(1))
    network(torch.ones(len(maps), maps.shape[2], 2, 2, dtype=torch.float64))


def recorded(batches: Sequence[Maps], **options: Any) -> MapRecorder:
    """Record a network whose maps are given ``[B, L, C]``, batch by batch."""
    network = scripted_network(*batches[0].shape[1:])
    with MapRecorder(network, **options) as recorder:
        for batch in batches:
            play(network, batch)
    return recorder
