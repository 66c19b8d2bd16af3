"""Attention maps as they are made, for whoever wants to look at them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from dia_lightning.attention._attached_block import AttachedBlock
from dia_lightning.attention._links import Slot

#: Called with the number of the layer, its map and the state after it.
Watcher = Callable[[int, Tensor, Any], None]


class AttentionLayer(NamedTuple):
    """A site with attention.

    Args:
        path: of the site in the network.
        stage: number of its stage, from 0 on.
        block: path of the block around it; the empty text if the network itself is the block.
    """

    path: str
    stage: int
    block: str


def attention_layers(network: nn.Module) -> list[AttentionLayer]:
    """Return the sites with attention, stage by stage and in each stage in the order in which they run.

    Args:
        network: a network that :func:`attach` was applied to, or any module that contains one.

    Raises:
        ValueError: if no attention is attached.

    Example:
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=20, block="basic"), "se", share="block")
        >>> [layer for layer in attention_layers(network) if layer.stage == 2][0]
        AttentionLayer(path='layer3.0.bn2', stage=2, block='layer3.0')
    """
    return [layer for layer, _ in _layers(network)]


@contextmanager
def watch_maps(network: nn.Module, watcher: Watcher) -> Iterator[list[AttentionLayer]]:
    """Let a function see every attention map of a network, in every forward within the context.

    Outputs and gradients stay as they are. A network is watched by one function at a time.

    Args:
        network: a network that :func:`attach` was applied to.
        watcher: called with the number of the layer in :func:`attention_layers`, the map, which broadcasts against
            the features ``[B, C, H, W]``, and the state after it. Neither may be changed.

    Yields:
        The layers.

    Raises:
        ValueError: if no attention is attached, or the network is watched already.

    Example:
        >>> import torch
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=20, block="basic"), "dia-lstm").eval()
        >>> seen = []
        >>> with watch_maps(network, lambda layer, attention_map, state: seen.append(attention_map.shape)):
        ...     _ = network(torch.zeros(2, 3, 32, 32))
        >>> len(seen), seen[0]
        (9, torch.Size([2, 16, 1, 1]))
    """
    layers = _layers(network)
    if any(slot.watcher is not None for _, slot in layers):
        raise ValueError("The maps of this network are watched already. Leave the inner context out.")
    try:
        for number, (_, slot) in enumerate(layers):
            slot.watcher = _numbered(watcher, number)
        yield [layer for layer, _ in layers]
    finally:
        for _, slot in layers:
            slot.watcher = None


def _layers(network: nn.Module) -> list[tuple[AttentionLayer, Slot]]:
    blocks = [(path, module) for path, module in network.named_modules() if isinstance(module, AttachedBlock)]
    if not blocks:
        raise ValueError("No attention is attached to this network. Call attach(network, ...) first.")
    layers = [
        (AttentionLayer(f"{path}.{slot.path}" if path else slot.path, slot.stage, path), slot)
        for path, block in blocks
        for slot in block.dia_slots()
    ]
    return sorted(layers, key=lambda item: item[1].layer)


def _numbered(watcher: Watcher, number: int) -> Callable[[Tensor, Any], None]:
    return lambda attention_map, state: watcher(number, attention_map, state)
