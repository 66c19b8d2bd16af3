"""Watch attention maps as they are computed.

Users call :func:`watch_maps`; analysis, which watches the same layers repeatedly, :func:`watched_layers` and
:func:`watching`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dia_lightning.attention._attached_block import AttachedBlock
from dia_lightning.attention._find import own_stages
from dia_lightning.attention._links import Slot
from dia_lightning.attention._own_attention import WatchedModule
from dia_lightning.attention._roles import add_role, remove_role

#: Called with the index of the layer, its map and the state after it.
Watcher = Callable[[int, Tensor, Any], None]


class AttentionLayer(NamedTuple):
    """A site with attention.

    Args:
        path: of the site in the network.
        stage: index of its stage, counted from 0.
        block: path of the block around it; the empty string if the network itself is the block.
    """

    path: str
    stage: int
    block: str


def attention_layers(network: nn.Module, *, own: bool | None = None, example: Any = None) -> list[AttentionLayer]:
    """Return the layers with attention, stage by stage, in the order in which they run within each stage.

    Args:
        network: a network that :func:`attach` was applied to, or any module that contains one; or one with its own
            attention modules, such as the squeeze-and-excitation of an EfficientNet.
        own: whether to return the network's own modules. By default, only if no attention is attached.
        example: input of the network, to find its own modules; as for :func:`find_sites`.

    Raises:
        ValueError: if there are none.

    Example:
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=20, block="basic"), "se", share="block")
        >>> [layer for layer in attention_layers(network) if layer.stage == 2][0]
        AttentionLayer(path='layer3.0.bn2', stage=2, block='layer3.0')
        >>> attention_layers(get_model("torchvision/mobilenet_v3_small"))[0]
        AttentionLayer(path='features.1.block.1', stage=0, block='features.1')
    """
    return [layer for layer, _ in watched_layers(network, own, example)]


#: A layer, and what holds its watcher: a slot, or a module of the network.
WatchedLayer: TypeAlias = tuple[AttentionLayer, Slot | nn.Module]


@contextmanager
def watch_maps(
    network: nn.Module, watcher: Watcher, *, own: bool | None = None, example: Any = None
) -> Iterator[list[AttentionLayer]]:
    """Pass every attention map of a network to a function, in every forward within the context.

    Outputs and gradients do not change. Only one function can watch a network at a time. Meanwhile compiled networks
    run uncompiled, so that no map is missed.

    Args:
        network: a network with attention, attached or its own.
        watcher: called with the index of the layer in :func:`attention_layers`, the map, which broadcasts against
            the features ``[B, C, H, W]``, and the state after it. It must change neither.
        own: as for :func:`attention_layers`.
        example: as for :func:`attention_layers`.

    Yields:
        The layers.

    Raises:
        ValueError: if there is no attention, or the network is already watched.

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
    with watching(watched_layers(network, own, example), watcher) as layers:
        yield layers


@contextmanager
def watching(watched: Sequence[WatchedLayer], watcher: Watcher) -> Iterator[list[AttentionLayer]]:
    """Pass the maps of layers to a function; like :func:`watch_maps`, for watching the same layers repeatedly.

    Args:
        watched: from :func:`watched_layers`.
        watcher: as for :func:`watch_maps`.
    """
    if any(getattr(place, "dia_watcher", None) or getattr(place, "watcher", None) for _, place in watched):
        raise ValueError("The maps of this network are already watched. Remove the inner context.")
    try:
        for number, (_, place) in enumerate(watched):
            numbered = _Numbered(watcher, number)
            if isinstance(place, Slot):
                place.watcher = numbered
            else:
                vars(place)["dia_watcher"] = numbered
                add_role(place, WatchedModule)
        with torch.compiler.set_stance("force_eager"):
            yield [layer for layer, _ in watched]
    finally:
        for _, place in watched:
            if isinstance(place, Slot):
                place.watcher = None
            elif isinstance(place, WatchedModule):
                remove_role(place, WatchedModule)
                vars(place).pop("dia_watcher")


def watched_layers(network: nn.Module, own: bool | None, example: Any) -> list[WatchedLayer]:
    """Return the layers, each with what holds its watcher; arguments as for :func:`attention_layers`."""
    blocks = [(path, module) for path, module in network.named_modules() if isinstance(module, AttachedBlock)]
    if own or (own is None and not blocks):
        try:
            stages = own_stages(network, example)
        except ValueError as error:
            raise ValueError(
                "No attention is attached to this network (call attach(network, ...) first), and none of its own was "
                f"found: {error}"
            ) from error
        return [
            (AttentionLayer(site.path, number, site.block), network.get_submodule(site.path))
            for number, stage in enumerate(stages)
            for site in stage
        ]
    if not blocks:
        raise ValueError("No attention is attached to this network. Call attach(network, ...) first.")
    slots = [(path, slot) for path, block in blocks for slot in block.dia_slots()]
    return [
        (AttentionLayer(f"{path}.{slot.path}" if path else slot.path, slot.stage, path), slot)
        for path, slot in sorted(slots, key=lambda item: item[1].layer)
    ]


class _Numbered:
    """A watcher of one layer. Copies of a watched network are not watched."""

    def __init__(self, watcher: Watcher, number: int) -> None:
        self.watcher = watcher
        self.number = number

    def __call__(self, attention_map: Tensor, state: Any) -> None:
        self.watcher(self.number, attention_map, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None
