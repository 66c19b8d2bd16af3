"""Prepare the blocks and layers of a network for attention."""

import copy
from collections.abc import Iterator
from itertools import groupby

from torch import nn

from dia_lightning.attention._attached_block import AttachedBlock, ChainOwner
from dia_lightning.attention._attached_site import AttachedSite
from dia_lightning.attention._attached_unit import AttachedUnit
from dia_lightning.attention._links import Chain, Link, Slot, parameters_of
from dia_lightning.attention._named_sites import axes_of_class
from dia_lightning.attention._own_attention import SharedModule
from dia_lightning.attention._places import Place
from dia_lightning.attention._roles import add_role
from dia_lightning.attention._sites import Site
from dia_lightning.attention._unit import AttentionUnit


def wire(model: nn.Module, unit: nn.Module, blocks: list[Place], stage: int, layers: Iterator[int]) -> None:
    """Give roles to the blocks of a chain, their sites and the modules around them, and the unit to the first block.

    Args:
        model: the network.
        unit: makes the maps.
        blocks: of the chain, in the order in which they run; the first is plugged.
        stage: number of the stage.
        layers: yields the number of the next site.
    """
    chain = Chain()
    for path, grouped in groupby(blocks, key=lambda place: place.path):
        together = list(grouped)  # several layers that one module runs itself, or one block
        block, parameters = together[0].block, parameters_of(together[0].block)
        slots: list[Slot] = []
        for place, site in _plugged_sites(together):
            norms = _norms(unit, place, site)
            if not slots and not chain.links:  # it uses the unit's own norm
                norms.pop("unit_norm", None)
            for name, norm in reversed(list(norms.values())):
                _register_behind(block, place.inside(site).partition(".")[0], name, norm)
            slots.append(_slot(unit, place, site, norms, stage, next(layers)))
            add_role(block.get_submodule(slots[-1].path), AttachedSite)
        stream = together[0].sites[0].stream
        number = parameters.index(stream) if stream in parameters else None
        link = Link(chain, path, tuple(slots), parameters, number, _unit_name(block))
        if link.before is None:
            block.add_module(link.unit, unit)
        vars(block)["dia_links"] = (*vars(block).get("dia_links", ()), link)
        add_role(block, AttachedBlock)
    if not isinstance(unit, SharedModule):
        add_role(unit, AttachedUnit)
    _give_owners(model, chain)


def take_out(model: nn.Module, blocks: list[Place]) -> None:
    """Replace the network's own attention modules with ``nn.Identity``, and keep them for :func:`put_back`."""
    for place, site in _plugged_sites(blocks):
        vars(place.block).setdefault("dia_kept", {})[place.inside(site)] = model.get_submodule(site.path)
        model.set_submodule(site.path, nn.Identity().train(place.block.training))


def let_go(blocks: list[Place]) -> None:
    """Keep only the places of the modules that a shared one replaces."""
    for place, site in _plugged_sites(blocks):
        vars(place.block)["dia_kept"][place.inside(site)] = None


def put_back(model: nn.Module) -> None:
    """Undo :func:`take_out`; where the network's own modules were shared, each gets a copy of the shared one.

    Raises:
        ValueError: if the shared module is in a block outside the network.
    """
    blocks = [module for module in model.modules() if "dia_kept" in vars(module)]
    attached = [module for module in model.modules() if isinstance(module, AttachedBlock)]
    shared = {
        link.chain: getattr(block, link.unit) for block in attached for link in block.dia_links if not link.before
    }
    chains: dict[tuple[nn.Module, str], Chain] = {
        (block, slot.path): link.chain
        for block in attached
        for link in block.dia_links
        for slot in link.slots
        if slot.is_whole
    }
    if any(chain not in shared for chain in chains.values()):
        raise ValueError("This is part of a network that shares its attention beyond it. Call detach() on the whole.")
    for block in blocks:
        for path, module in vars(block).pop("dia_kept").items():
            if (block, path) in chains:
                module = copy.deepcopy(shared[chains[block, path]].module)
            if module is not None and isinstance(block.get_submodule(path), nn.Identity):  # else the user's layer
                block.set_submodule(path, like(module, block))


def _plugged_sites(blocks: list[Place]) -> list[tuple[Place, Site]]:
    return [(place, site) for place in blocks if place.is_plugged for site in place.sites]


def _slot(
    unit: nn.Module, place: Place, site: Site, norms: dict[str, tuple[str, nn.Module]], stage: int, layer: int
) -> Slot:
    path = place.inside(site)
    return Slot(
        path,
        site.before,
        site.channels,
        channel_axis=site.channel_axis,
        batch_axis=site.batch_axis,
        ndim=axes_of_class(place.block.get_submodule(path)) if site.shape is None else len(site.shape),
        branch_norm=norms.get("branch_norm", (None,))[0],
        unit_norm=norms.get("unit_norm", (None,))[0],
        stage=stage,
        layer=layer,
        is_whole=isinstance(unit, SharedModule),
    )


def _unit_name(block: nn.Module) -> str:
    """Return the name of a block's next unit: several chains may begin in it."""
    taken = [link.unit for link in vars(block).get("dia_links", ()) if link.before is None]
    return f"dia_{len(taken) + 1}" if taken else "dia"


def _norms(unit: nn.Module, place: Place, site: Site) -> dict[str, tuple[str, nn.Module]]:
    """Return the norms that a block gets for a site, with their names, in the order in which they run."""
    norms: dict[str, nn.Module] = {}
    if place.rule.branch_norm:
        norms["branch_norm"] = nn.BatchNorm2d(place.channels)
    if isinstance(unit, AttentionUnit) and unit.norm is not None and not unit.share_norm:
        norms["unit_norm"] = copy.deepcopy(unit.norm)
    suffix = "" if place.is_alone else f"_{place.inside(site).replace('.', '_')}"
    return {kind: (f"{kind}{suffix}", like(norm, place.block)) for kind, norm in norms.items()}


def refuse_unfit_places(unit: nn.Module, chain: list[Place]) -> None:
    """Refuse blocks that already use names the attention needs.

    Raises:
        ValueError: if there are any.
    """
    for place in chain:
        names = [name for site in place.sites for name, _ in _norms(unit, place, site).values()]
        for name in ["dia", "dia_2", *names] if place is chain[0] else names:
            if hasattr(place.block, name):
                raise ValueError(
                    f"{type(place.block).__name__} already has an attribute {name!r}, where a module of the attention "
                    f"would go ({place.path}). Rename it."
                )


def _register_behind(block: nn.Module, child: str, name: str, module: nn.Module) -> None:
    """Register a module after a child of a block: the order in which they run and in which 0.1 numbered parameters."""
    block.add_module(name, module)
    names = [] if isinstance(block, nn.Sequential) else list(block._modules)
    for behind in names[names.index(child) + 1 : -1] if names else ():
        block._modules[behind] = block._modules.pop(behind)


def _give_owners(model: nn.Module, chain: Chain) -> None:
    """Make every module around the blocks of a chain an owner, as its forward may run them."""
    blocks = [link.path for link in chain.links]
    if "" in blocks:
        return  # the network itself is the block
    for name, module in model.named_modules():
        holds_all = all(not name or path.startswith(f"{name}.") for path in blocks)
        if holds_all and type(module).forward is not nn.Module.forward:  # lists are never called
            vars(module)["dia_chains"] = (*vars(module).get("dia_chains", ()), chain)
            add_role(module, ChainOwner)


def like(module: nn.Module, block: nn.Module) -> nn.Module:
    """Move a new module to the device, dtype and mode of a block."""
    module.train(block.training)
    parameter = next(block.parameters(), None)
    return module if parameter is None else module.to(parameter.device, parameter.dtype)
