"""What attention costs on a network: parameters, operations, time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dia_lightning.attention import attach
from dia_lightning.models._build_on_meta import build_on_meta
from dia_lightning.models._require_images import require_images

#: The arms of the comparison: name, attention, how it is shared.
ARMS: tuple[tuple[str, str | None, Literal["stage", "block"]], ...] = (
    ("none", None, "stage"),
    ("se per block", "se", "block"),
    ("se shared", "se", "stage"),
    ("dia-lstm", "dia-lstm", "stage"),
)


@dataclass(frozen=True)
class Cost:
    """Cost of a network with one kind of attention.

    Args:
        attention: which kind, as in :data:`ARMS`.
        parameters: number of parameters.
        flops: floating-point operations of one forward for one image; a multiply-add counts as two.
        latency: time of one forward relative to the plain network's, measured alternately; ``None`` if not measured.
    """

    attention: str
    parameters: int
    flops: int
    latency: float | None = None


def network_cost(
    build: Callable[[], nn.Module], images: Tensor, *, repeats: int = 10, **attention_args: Any
) -> list[Cost]:
    """Compare a network without attention, with SE per block and shared, and with DIA-LSTM.

    Args:
        build: makes the plain network.
        images: example input ``[B, C, H, W]``; networks are moved to its device and timed there.
        repeats: rounds of timing; in each, all arms run once in turn, so a machine whose speed drifts favours none.
            0 measures no time and allocates nothing.
        **attention_args: further arguments of DIA-LSTM, for example ``reduction=20``.

    Returns:
        One entry per arm, plain first.

    Raises:
        ValueError: if attention cannot be attached to the network, ``images`` is not a batch of images, or ``repeats``
            is negative.

    Example:
        >>> import torch
        >>> from dia_lightning.models import get_model, network_cost
        >>> plain, *_, dia = network_cost(lambda: get_model("resnet164"), torch.empty(1, 3, 32, 32), repeats=0)
        >>> plain.parameters, dia.parameters
        (1727284, 1946132)
    """
    require_images(images)
    if repeats < 0:
        raise ValueError(f"repeats must be 0 or more, got {repeats}. 0 measures no time.")
    networks = [_arm(build, attention, share, attention_args) for _, attention, share in ARMS]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    flops = [_flops(network, images.shape) for network in networks]
    ratios: list[float] | list[None] = [None] * len(ARMS)
    if repeats > 0:
        real = [network.to_empty(device=images.device).eval() for network in networks]
        ratios = list(_latency_ratios(real, images, repeats))
    names = [name for name, _, _ in ARMS]
    return [Cost(*values) for values in zip(names, counts, flops, ratios, strict=True)]


def _arm(
    build: Callable[[], nn.Module], attention: str | None, share: Literal["stage", "block"], arguments: dict[str, Any]
) -> nn.Module:
    network = build_on_meta(build)
    if attention is not None:
        attach(network, attention, share=share, **(arguments if attention == "dia-lstm" else {}))
    return network.eval()


def _flops(network: nn.Module, shape: torch.Size) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.empty(1, *shape[1:], device="meta"))
    return int(counter.get_total_flops())


def _latency_ratios(networks: list[nn.Module], images: Tensor, repeats: int) -> Iterator[float]:
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.zero_() if not tensor.is_floating_point() else tensor.data.fill_(0.01)
        _seconds(network, images)  # the first forward chooses kernels
    rounds = [[_seconds(network, images) for network in networks] for _ in range(repeats)]
    for arm in range(len(networks)):
        yield median(times[arm] / times[0] for times in rounds)


def _seconds(network: nn.Module, images: Tensor) -> float:
    _wait_for(images.device)
    start = time.perf_counter()
    with torch.no_grad():
        network(images)
    _wait_for(images.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
