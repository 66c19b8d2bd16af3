"""Put attention into a network, and take it out again."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count, groupby
from typing import Any, Literal, TypeVar

from torch import nn

from dia_lightning.attention._attached_block import AttachedBlock, ChainOwner, take_apart
from dia_lightning.attention._attached_site import AttachedSite
from dia_lightning.attention._attached_unit import AttachedUnit
from dia_lightning.attention._links import Chain, Link, Slot, parameters_of
from dia_lightning.attention._masks import plugged
from dia_lightning.attention._named_sites import axes_of_class
from dia_lightning.attention._places import Place, Sites, all_places, places
from dia_lightning.attention._registry import attention_builder
from dia_lightning.attention._roles import add_role
from dia_lightning.attention._sites import Branch, Site
from dia_lightning.attention._unit import AttentionUnit, start_at_zero

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    attention: str | Callable[..., nn.Module],
    *,
    example: Any = None,
    share: Literal["stage", "block"] = "stage",
    plug: str | Sequence[bool | int] | None = None,
    identity: bool = False,
    branch_norm: bool | None = None,
    branches: Sequence[Branch] | None = None,
    sites: Sites | None = None,
    **attention_args: Any,
) -> Model:
    """Attach attention to the residual blocks of a network, in place.

    Every block's residual branch is multiplied by an attention map just before it is added to the shortcut. Weights
    of the plain network load into the attached one and only the unit's keys are missing; :func:`detach` gives the
    plain network back.

    Args:
        model: the network, or any module that contains one, for example a ``LightningModule``.
        attention: a registered name (see :func:`list_attention`), or a callable ``channels -> nn.Module`` whose
            modules map ``(features [B, C, H, W], state)`` to ``(map, state)``; see :class:`AttentionUnit` for tokens,
            sequences and volumes. A callable that takes ``spatial_dims`` is given 3 for volumes and video, else 2.
        share: ``"stage"`` for one unit per stage, shared by its blocks (DIA), or ``"block"`` for one unit per block.
        plug: which blocks get attention, as one truth value per block in order, or a string such as ``"110|0011"``, or
            the name of a mask in :data:`EAN_MASKS`. Blocks that are left out hand the state on unchanged. By default
            every block.
        identity: start with every map equal to 1, so that the network computes what it computed before. The default
            is the paper's start, where maps of DIA-LSTM are near 1/4.
        branch_norm: whether branches that do not end in a norm (pre-activation networks) get a batch norm before the
            unit, as in the authors' code. A plain control arm lacks these norms: compare with ``branch_norm=False``
            where it matters. By default true unless ``identity`` is set.
        branches: which branches of transformer blocks: ``["attention"]``, ``["mlp"]`` or both. By default both; in
            U-Nets of diffusers the residual blocks only, unless ``["conv", "attention"]`` asks for both.
        sites: for networks that are not known: patterns of module paths such as ``"encoder.*.conv2"``, or a function
            ``(path, module) -> bool``, that name layers whose output ends a residual branch. The block of each is the
            module around it that is repeated, else the nearest one that is no plain container.
        **attention_args: further arguments of the attention module, for example ``reduction=8``.

    Returns:
        The same object, with attention.

    Raises:
        ValueError: if attention is attached already, the network is wrapped, sharded or compiled, no block is known,
            a name is in use that the attention needs, or an argument does not fit.

    Source:
        arXiv 2210.16101 and 1905.10671; masks of blocks from arXiv 2011.14058. The identity start is this package's
        own.

    Example:
        >>> from dia_lightning.models import get_model
        >>> model = attach(get_model("cifar_resnet", depth=29, num_classes=10), "dia-lstm", reduction=4)
        >>> [name for name, _ in model.named_modules() if name.endswith(".dia")]
        ['layer1.0.dia', 'layer2.0.dia', 'layer3.0.dia']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {model!r}. Make named networks with get_model(name).")
    if share not in ("stage", "block"):
        raise ValueError(f"share must be 'stage' or 'block', got {share!r}.")
    if identity and branch_norm:
        raise ValueError(
            "identity=True and branch_norm=True contradict each other: an added norm changes what the network computes."
        )
    build = attention_builder(attention, attention_args)
    _refuse_unfit(model)
    stages = places(model, example=example, branches=branches, sites=sites)
    every = list(all_places(stages))
    taken = dict(zip(every, plugged(plug, list(map(len, stages))), strict=True))
    with_norm = not identity if branch_norm is None else branch_norm
    chains = _chains(stages, taken, share)
    if share == "stage":
        _warn_of_single(chains)
    units = [_new_unit(build, chain[0], identity) for chain in chains]  # all, before the network is touched
    for unit, chain in zip(units, chains, strict=True):
        _refuse_unfit_places(unit, chain, with_norm)
    stage_of = {place: number for number, stage in enumerate(stages) for place in stage}
    layers = count()
    for unit, chain in zip(units, chains, strict=True):
        links = _attach_chain(unit, chain, taken, with_norm, stage_of[chain[0]], layers)
        _give_owners(model, [place.path for place in chain], links)
    return model


def detach(model: Model) -> Model:
    """Take attention out of a network, in place, and give the plain network back.

    Args:
        model: a network that :func:`attach` was applied to.

    Returns:
        The same object, without attention.

    Raises:
        ValueError: if no attention is attached.

    Example:
        >>> from dia_lightning.models import get_model
        >>> plain = get_model("cifar_resnet", depth=20, block="basic")
        >>> keys = list(plain.state_dict())
        >>> list(detach(attach(plain, "se")).state_dict()) == keys
        True
    """
    if not any(isinstance(module, AttachedBlock) for module in model.modules()):
        raise ValueError("No attention is attached to this network.")
    for module in list(model.modules()):
        take_apart(module)
    return model


def _refuse_unfit(model: nn.Module) -> None:
    """Refuse a network that has attention, or that is wrapped by something that would not see it."""
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule", "ScriptModule")
    for name, module in model.named_modules():
        if isinstance(module, AttachedBlock):
            raise ValueError("Attention is attached to this network already. Call detach(model) first.")
        bases = [base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")]
        wrapper = next((base for base in bases if base in wrappers), None)
        if wrapper is not None or module._compiled_call_impl is not None:
            raise ValueError(
                f"{type(module).__name__} at {name or 'the root'} is wrapped already "
                f"({wrapper or 'compile()'}), which would not know the attention's parameters or keep code without it. "
                "Attach before the network is wrapped, sharded or compiled."
            )


def _chains(stages: list[list[Place]], taken: dict[Place, bool], share: str) -> list[list[Place]]:
    """Group blocks that share one unit. A chain begins and ends with a plugged block."""
    if share == "block":
        return [[place] for place in all_places(stages) if taken[place]]
    chains = []
    for stage in stages:
        inside = [index for index, place in enumerate(stage) if taken[place]]
        if inside:
            chains.append(stage[inside[0] : inside[-1] + 1])
    return chains


def _warn_of_single(chains: list[list[Place]]) -> None:
    single = [chain[0] for chain in chains if len(chain) == 1]
    if single:
        listed = [f"{place.sites[0].path} ({place.size})" for place in single[:5]]
        warnings.warn(
            f"{len(single)} of {len(chains)} units serve a single block, so that nothing is shared there: "
            f"{', '.join(listed)}{', ...' if len(single) > 5 else ''}. Blocks share a unit if they follow one another "
            "with equal width and equally many positions and `plug` takes them; or name a group, as in "
            "sites=[['blocks.*.conv2']].",
            stacklevel=3,
        )


def _new_unit(build: Callable[..., nn.Module], place: Place, identity: bool) -> nn.Module:
    try:
        unit = build(place.channels, place.spatial_dims)
    except TypeError as error:
        raise ValueError(
            f"The attention cannot be built for {place.channels} channels ({place.path}): {error}."
        ) from error
    if not isinstance(unit, nn.Module):
        raise ValueError(f"The attention callable must return an nn.Module, got {type(unit).__name__}.")
    if place.rule.zero_bias and isinstance(unit, AttentionUnit):  # a user's own unit knows how it starts
        for layer in unit.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                start_at_zero(layer, ["bias"])
    if identity:
        if not isinstance(unit, AttentionUnit):
            raise ValueError(
                f"identity=True needs an attention module with start_at_identity(), as subclasses of "
                f"dia_lightning.attention.AttentionUnit have; {type(unit).__name__} is none."
            )
        unit.start_at_identity()
    try:
        inspect.signature(unit.forward).bind(None, None)
    except TypeError:
        raise ValueError(
            f"{type(unit).__name__}.forward must take (features, state) and return (map, state), where None is a state "
            f"too; it takes {inspect.signature(unit.forward)}."
        ) from None
    return _like(unit, place.block)


def _attach_chain(
    unit: nn.Module, chain: list[Place], taken: dict[Place, bool], with_norm: bool, stage: int, layers: Iterator[int]
) -> Chain:
    """Give the blocks of a chain and their sites their roles, and the first block the unit."""
    links = Chain()
    for path, grouped in groupby(chain, key=lambda place: place.path):
        together = list(grouped)  # several layers that one module runs by itself, or one block
        block, parameters = together[0].block, parameters_of(together[0].block)
        slots: list[Slot] = []
        for place in together:
            for site in place.sites if taken[place] else ():
                norms = _norms(unit, place, site, with_norm)
                if not slots and not links.links:  # has the norm of the unit itself
                    norms.pop("unit_norm", None)
                for name, norm in reversed(list(norms.values())):
                    _register_behind(block, place.inside(site).partition(".")[0], name, norm)
                slots.append(_slot(place, site, norms, stage, next(layers)))
                add_role(block.get_submodule(slots[-1].path), AttachedSite)
        stream = together[0].sites[0].stream
        number = parameters.index(stream) if stream in parameters else None
        link = Link(links, path, tuple(slots), parameters, number, _unit_name(block))
        if link.before is None:
            block.add_module(link.unit, unit)
        vars(block)["dia_links"] = (*vars(block).get("dia_links", ()), link)
        add_role(block, AttachedBlock)
    add_role(unit, AttachedUnit)
    return links


def _slot(place: Place, site: Site, norms: dict[str, tuple[str, nn.Module]], stage: int, layer: int) -> Slot:
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
    )


def _unit_name(block: nn.Module) -> str:
    """Return the name that the next unit of a block gets: several chains may begin in it."""
    taken = [link.unit for link in vars(block).get("dia_links", ()) if link.before is None]
    return f"dia_{len(taken) + 1}" if taken else "dia"


def _norms(unit: nn.Module, place: Place, site: Site, with_norm: bool) -> dict[str, tuple[str, nn.Module]]:
    """Return the norms that a block gets for a site, with their names, in the order in which they run."""
    norms: dict[str, nn.Module] = {}
    if with_norm and place.rule.branch_norm:
        norms["branch_norm"] = nn.BatchNorm2d(place.channels)
    if isinstance(unit, AttentionUnit) and unit.norm is not None and not unit.share_norm:
        norms["unit_norm"] = copy.deepcopy(unit.norm)
    suffix = "" if place.is_alone else f"_{place.inside(site).replace('.', '_')}"
    return {kind: (f"{kind}{suffix}", _like(norm, place.block)) for kind, norm in norms.items()}


def _refuse_unfit_places(unit: nn.Module, chain: list[Place], with_norm: bool) -> None:
    for place in chain:
        names = [name for site in place.sites for name, _ in _norms(unit, place, site, with_norm).values()]
        for name in ["dia", *names] if place is chain[0] else names:
            if hasattr(place.block, name):
                raise ValueError(
                    f"{type(place.block).__name__} has an attribute {name!r} already, where a module of the attention "
                    f"would go ({place.path}). Rename it."
                )


def _register_behind(block: nn.Module, child: str, name: str, module: nn.Module) -> None:
    """Register a module behind a child of a block: as they run, and as version 0.1 numbered parameters."""
    block.add_module(name, module)
    names = [] if isinstance(block, nn.Sequential) else list(block._modules)
    for behind in names[names.index(child) + 1 : -1] if names else ():
        block._modules[behind] = block._modules.pop(behind)


def _give_owners(model: nn.Module, blocks: list[str], chain: Chain) -> None:
    """Let every module around the blocks of a chain know that its forward may run them."""
    if "" in blocks:
        return  # the network itself is the block
    for name, module in model.named_modules():
        holds_all = all(not name or path.startswith(f"{name}.") for path in blocks)
        if holds_all and type(module).forward is not nn.Module.forward:  # lists are never called
            vars(module)["dia_chains"] = (*vars(module).get("dia_chains", ()), chain)
            add_role(module, ChainOwner)


def _like(module: nn.Module, block: nn.Module) -> nn.Module:
    """Bring a new module to the device, dtype and mode of a block."""
    module.train(block.training)
    parameter = next(block.parameters(), None)
    return module if parameter is None else module.to(parameter.device, parameter.dtype)
