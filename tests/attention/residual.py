"""Small residual networks whose branches end in a chosen layer, with attention, and their plain formulation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.attention import _recalibration as recalibration
from dia_lightning.attention import attach

from .networks import backward


class Residual(nn.Module):
    """A block whose branch ends in a chosen layer."""

    def __init__(self, body: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(self.body(x)))


def conv(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


def without_bias(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width)
    norm.bias = None  # type: ignore[assignment]
    return norm


LAST: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "batch norm": (conv, nn.BatchNorm2d),
    "norm without statistics": (conv, lambda width: nn.BatchNorm2d(width, track_running_stats=False)),
    "norm without momentum": (conv, lambda width: nn.BatchNorm2d(width, momentum=None)),
    "norm without weight": (conv, lambda width: nn.BatchNorm2d(width, affine=False)),
    "norm without bias": (conv, without_bias),
    "norm of volumes": (lambda width: nn.Conv3d(width, width, 1), nn.BatchNorm3d),
    "group norm": (conv, lambda width: nn.GroupNorm(2, width)),
    "convolution": (lambda width: nn.BatchNorm2d(width), conv),
    "tokens": (lambda width: nn.LayerNorm(width), lambda width: nn.Linear(width, width)),
}


def network(kind: str, name: str | Callable[[int], nn.Module] = "dia-lstm") -> Any:
    body, last = LAST[kind]
    plain = nn.Sequential(*(Residual(body(6), last(6)) for _ in range(3))).double()
    return attach(plain, name, sites="*.last", example=features(kind))


def features(kind: str = "batch norm") -> Tensor:
    shape = {"norm of volumes": (3, 6, 2, 3, 4), "tokens": (3, 7, 6)}.get(kind, (3, 6, 5, 4))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@contextmanager
def plain_formulation() -> Iterator[None]:
    threshold = recalibration.SMALL_ON_CPU
    recalibration.SMALL_ON_CPU = 2**62
    try:
        yield
    finally:
        recalibration.SMALL_ON_CPU = threshold


def go_back(output: Tensor) -> None:
    backward(loss_of(output))


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).square().sum()


def function_nodes(output: Tensor) -> set[str]:
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(parent for parent, _ in node.next_functions)
    return {type(node).__name__ for node in seen}
