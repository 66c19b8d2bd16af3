"""Fold attention with a constant map into the weights of the layer at its site.

:mod:`dia_lightning.analysis` measures the maps and decides; this module knows what can be folded, and how.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.attention._attached_block import AttachedBlock, ChainOwner
from dia_lightning.attention._attached_site import AttachedSite
from dia_lightning.attention._links import Chain, Link, Slot
from dia_lightning.attention._roles import plain_class, remove_role
from dia_lightning.attention.watching import AttentionLayer, watched_layers

#: What prevents folding, by slot; empty where the map can be multiplied into the layer.
Obstacles = dict[Slot, str]


def attached_slots(network: nn.Module) -> list[tuple[AttentionLayer, Slot]]:
    """Return the layers with attention, each with its slot, in the order in which they run in a stage.

    Raises:
        ValueError: if there are none.
    """
    return [(layer, slot) for layer, slot in watched_layers(network, False, None) if isinstance(slot, Slot)]


@contextmanager
def finding_obstacles(network: nn.Module) -> Iterator[Obstacles]:
    """Find out, from forwards within the context, at which slots a map cannot be multiplied into the layer.

    A map can be folded into a layer if its output scales with a factor per channel on its weights, or on those of the
    last layer in it. The first forward tries this, so any kind of layer works, and an activation after a norm in the
    same module is detected.
    """
    found: Obstacles = {}
    used = _uses(network)
    handles = []
    for block, link in _links(network):
        for slot in link.slots:
            found[slot] = _known_obstacle(block, slot, used)
            if not found[slot]:
                found[slot] = "it has not run"
                hook = _trial(slot, found)
                handles.append(block.get_submodule(slot.path).register_forward_hook(hook, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def keep_remembered(network: nn.Module, remembering: Set[Slot], obstacles: Obstacles) -> None:
    """Note an obstacle at the slots whose state a later slot with attention needs.

    Args:
        network: with attention.
        remembering: slots after which the unit passes on a state.
        obstacles: at all slots; the ones found are added.
    """
    for chain in _chains(network):
        slots = sorted((slot for link in chain.links for slot in link.slots), key=lambda slot: slot.layer)
        if remembering.isdisjoint(slots):
            continue
        kept = [number for number, slot in enumerate(slots) if obstacles[slot]]
        for slot in slots[: max(kept, default=0)]:
            obstacles[slot] = obstacles[slot] or "later sites need the state that is made here"


def _known_obstacle(block: nn.Module, slot: Slot, used: Counter[int]) -> str:
    site = block.get_submodule(slot.path)
    name = plain_class(site).__name__
    target = _target(site, slot.channels)
    if slot.is_whole:
        return "its unit is a module of the network, which returns no map"
    if slot.before:
        return f"the input of the {name} is multiplied, not its output"
    weights = _weights(target)
    if not _is_per_channel(weights, slot.channels):
        return f"{name} has no weights per channel"
    if used[id(site)] > 1 or used[id(target)] > 1 or any(used[id(weight)] > 1 for weight in weights):
        return f"the weights of the {name} are used elsewhere too"
    if slot.branch_norm is None:
        return ""
    norm = block.get_submodule(slot.branch_norm)
    is_affine = isinstance(target, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    is_batch_norm = isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm)
    if not is_affine or not is_batch_norm or norm.running_mean is None:
        return f"the norm after the {name} cannot be folded into its weights"
    return ""


def _trial(slot: Slot, found: Obstacles) -> Callable[..., None]:
    """Return a hook that multiplies the weights of a layer, runs it again and restores them."""

    @torch.no_grad()
    def hook(site: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if found[slot] != "it has not run":
            return
        features: Tensor = output[0] if isinstance(output, tuple) else output
        random = torch.Generator().manual_seed(slot.layer)
        factor = torch.rand(slot.channels, generator=random) + 0.5  # of both signs, so that activations show
        factor *= torch.randint(0, 2, factor.shape, generator=random) * 2 - 1
        factor = factor.to(features)
        weights = _weights(_target(site, slot.channels))
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            weight.mul_(_over(factor, weight))
        again = site.forward(*args, **kwargs)  # past the attention
        for weight, values in zip(weights, kept, strict=True):
            weight.copy_(values)
        again = again[0] if isinstance(again, tuple) else again
        wanted = features.movedim(slot.channel_axis, -1) * factor
        difference = (again.movedim(slot.channel_axis, -1) - wanted).abs().max()
        follows = bool(difference <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max())
        found[slot] = "" if follows else f"{plain_class(site).__name__} does not scale with its weights"

    return hook


def fold(network: nn.Module, maps: Mapping[Slot, Tensor]) -> None:
    """Multiply layers by constant maps, and remove the attention from their slots, in place.

    Args:
        network: with attention.
        maps: of slots without obstacles ``[C]``. The state of a unit with memory is lost after its slots.
    """
    with torch.no_grad():
        for block, link in _links(network):
            for slot in link.slots:
                if slot in maps:
                    _multiply(block, slot, maps[slot])
    for block, link in _links(network):
        _take_out(block, [slot for slot in link.slots if slot in maps])
        link.slots = tuple(slot for slot in link.slots if slot not in maps)
    for chain in _chains(network):
        _shorten(network, chain)
    for module in list(network.modules()):
        if isinstance(module, ChainOwner):
            module.dia_chains = tuple(chain for chain in module.dia_chains if chain.links)
            if not module.dia_chains:
                del module.dia_chains
                remove_role(module, ChainOwner)


def _multiply(block: nn.Module, slot: Slot, attention_map: Tensor) -> None:
    target: Any = _target(block.get_submodule(slot.path), slot.channels)
    weights = _weights(target)
    factor = attention_map.to(weights[0].device, torch.float64)
    if slot.branch_norm is not None:
        norm: Any = block.get_submodule(slot.branch_norm)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        shift = (shift if norm.bias is None else shift + norm.bias.double()) * factor
        factor = factor * scale
        bias = shift if target.bias is None else target.bias.double() * factor + shift
        target.bias = nn.Parameter(bias.to(target.weight), target.weight.requires_grad)
        weights = [target.weight]
    for weight in weights:
        weight.copy_(weight.double() * _over(factor, weight))


def _take_out(block: nn.Module, slots: Sequence[Slot]) -> None:
    kept = [slot for slot in block.dia_slots() if slot not in slots]  # type: ignore[operator]
    sites = [block.get_submodule(slot.path) for slot in kept]
    for slot in slots:
        site = block.get_submodule(slot.path)
        if isinstance(site, AttachedSite) and all(site is not other for other in sites):
            remove_role(site, AttachedSite)
        for name in (slot.branch_norm, slot.unit_norm):
            if name is not None:
                del block._modules[name]


def _shorten(network: nn.Module, chain: Chain) -> None:
    """End the chain at the last block with a slot. Before that, blocks without slots pass the state on."""
    ends = [number for number, link in enumerate(chain.links, start=1) if link.slots]
    behind = chain.links[max(ends, default=0) :]
    del chain.links[max(ends, default=0) :]
    if chain.links:
        chain.links[-1].last = True
    for block, link in _links(network):
        if link not in behind:
            continue
        if link.before is None:
            del block._modules[link.unit]
        links = tuple(other for other in block.dia_links if other is not link)
        vars(block)["dia_links"] = links
        if not links:
            remove_role(block, AttachedBlock)
            del block.dia_links


def _links(network: nn.Module) -> list[tuple[AttachedBlock, Link]]:
    blocks = [module for module in network.modules() if isinstance(module, AttachedBlock)]
    return [(block, link) for block in blocks for link in block.dia_links]


def _chains(network: nn.Module) -> list[Chain]:
    return list(dict.fromkeys(link.chain for _, link in _links(network)))


def _target(site: nn.Module, channels: int) -> nn.Module:
    """Return the layer that likely computes the last step of a site: itself, or the last one with weights inside it."""
    layers = [site, *reversed([module for module in site.modules() if module is not site])]
    return next((layer for layer in layers if _is_per_channel(_weights(layer), channels)), site)


def _is_per_channel(weights: Sequence[Tensor], channels: int) -> bool:
    return len(weights) > 0 and all(weight.ndim > 0 and len(weight) == channels for weight in weights)


def _weights(layer: nn.Module) -> list[Tensor]:
    """Return the tensors that a layer itself multiplies by and adds; frozen norms keep them in buffers."""
    buffers = dict(layer.named_buffers(recurse=False))
    return [*layer.parameters(recurse=False), *(buffers[name] for name in ("weight", "bias") if name in buffers)]


def _over(factor: Tensor, weight: Tensor) -> Tensor:
    """Return a factor per channel in a shape that broadcasts against a weight, whose first axis is the channels."""
    return factor.reshape(-1, *[1] * (weight.ndim - 1)).to(torch.promote_types(factor.dtype, weight.dtype))


def _uses(network: nn.Module) -> Counter[int]:
    """Return how often a network uses each module, parameter and buffer, by id."""
    uses = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    uses.update(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    uses.update(id(buffer) for _, buffer in network.named_buffers(remove_duplicate=False))
    return uses
