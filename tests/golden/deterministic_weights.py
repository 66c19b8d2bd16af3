"""Weights and images that anybody can make again from their names, so that golden files need not hold them."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor


def _random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))  # a legacy generator: its stream is frozen


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Makes the tensor of a state dict's key, on the scale of a trained network."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_var"):
        values = _random(name).uniform(0.5, 1.5, shape)
    elif len(shape) == 4:
        values = _random(name).randn(*shape) * math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    elif len(shape) == 2:
        values = _random(name).randn(*shape) / math.sqrt(shape[1])
    else:
        norm_weight = name.endswith(".weight")
        values = _random(name).randn(*shape) * 0.1 + (1 if norm_weight else 0)
    return torch.from_numpy(values.astype(np.float32))


def state_dict(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Makes a whole state dict."""
    return {name: weight(name, tuple(shape)) for name, shape in shapes.items()}


def images() -> Tensor:
    """Makes four images [4, 3, 32, 32]."""
    return torch.from_numpy(_random("images").randn(4, 3, 32, 32).astype(np.float32))


def probe(name: str, gradient: Tensor) -> float:
    """Projects a gradient on a random direction that belongs to its name."""
    direction = torch.from_numpy(_random(f"probe of {name}").randn(*gradient.shape))
    return float((gradient.double() * direction).sum())
