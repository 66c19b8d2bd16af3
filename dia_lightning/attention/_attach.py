"""Put attention into a network, and take it out again."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from torch import nn

from dia_lightning.attention._attached_block import AttachedBlock, ChainOwner, take_apart
from dia_lightning.attention._attached_site import AttachedSite
from dia_lightning.attention._attached_unit import AttachedUnit
from dia_lightning.attention._links import Chain, Link, Slot
from dia_lightning.attention._masks import EAN_MASKS
from dia_lightning.attention._registry import attention_builder
from dia_lightning.attention._roles import add_role
from dia_lightning.attention._site_table import BLOCK_RULES
from dia_lightning.attention._sites import (
    Branch,
    Place,
    Site,
    all_places,
    axes_of,
    find_places,
    named_places,
    parameters_of,
    possible_sites,
)
from dia_lightning.attention._unit import AttentionUnit, start_at_zero

Model = TypeVar("Model", bound=nn.Module)
#: A pattern of module paths, several, or a function of path and module.
Sites: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool]


def attach(
    model: Model,
    attention: str | Callable[..., nn.Module],
    *,
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
    stages = _stages(model, branches, sites)
    plugged = dict(zip((place.path for place in all_places(stages)), _mask(plug, stages), strict=True))
    with_norm = not identity if branch_norm is None else branch_norm
    chains = _chains(stages, plugged, share)
    if share == "stage" and len(chains) > 1 and all(len(chain) == 1 for chain in chains):
        warnings.warn(
            f"Nothing is shared: each of the {len(chains)} stages ({', '.join(chain[0].path for chain in chains[:3])}"
            f"{', ...' if len(chains) > 3 else ''}) has a single block, so every block gets a unit of its own.",
            stacklevel=2,
        )
    units = [_new_unit(build, chain[0], identity) for chain in chains]  # all, before the network is touched
    for unit, chain in zip(units, chains, strict=True):
        _refuse_unfit_places(unit, chain, with_norm)
    stage_of = {place.path: number for number, stage in enumerate(stages) for place in stage}
    layers = count()
    for unit, chain in zip(units, chains, strict=True):
        links = _attach_chain(unit, chain, plugged, with_norm, stage_of[chain[0].path], layers)
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


def _stages(model: nn.Module, branches: Sequence[Branch] | None, sites: Sites | None) -> list[list[Place]]:
    if sites is not None:
        if branches is not None:
            raise ValueError("branches and sites exclude each other: sites name the ends of branches themselves.")
        if not callable(sites) and not sites:
            raise ValueError("sites names no module. Give patterns such as ['encoder.*.conv2'], or leave it out.")
        patterns = [sites] if isinstance(sites, str) else sites
        if not callable(patterns) and not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"sites takes patterns of module paths, such as ['encoder.*.conv2'], got {sites!r}.")
        return named_places(model, patterns)
    for branch in [branches] if isinstance(branches, str) else branches or ():
        if isinstance(branches, str) or branch not in get_args(Branch):
            known = ", ".join(map(repr, get_args(Branch)))
            raise ValueError(f"branches takes a list of {known}, got {branch!r}.")
    stages = find_places(model, BLOCK_RULES, branches)
    if not stages:
        raise ValueError(_nothing_to_attach_to(model, branches))
    return stages


def _chains(stages: list[list[Place]], plugged: dict[str, bool], share: str) -> list[list[Place]]:
    """Group blocks that share one unit. A chain begins and ends with a plugged block."""
    if share == "block":
        return [[place] for place in all_places(stages) if plugged[place.path]]
    chains = []
    for stage in stages:
        inside = [index for index, place in enumerate(stage) if plugged[place.path]]
        if inside:
            chains.append(stage[inside[0] : inside[-1] + 1])
    return chains


def _new_unit(build: Callable[..., nn.Module], place: Place, identity: bool) -> nn.Module:
    try:
        unit = build(place.channels, place.spatial_dims)
    except TypeError as error:
        raise ValueError(
            f"The attention cannot be built for {place.channels} channels ({place.path}): {error}."
        ) from error
    if not isinstance(unit, nn.Module):
        raise ValueError(f"The attention callable must return an nn.Module, got {type(unit).__name__}.")
    if place.zero_bias and isinstance(unit, AttentionUnit):  # a user's own unit knows how it starts
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
    unit: nn.Module, chain: list[Place], plugged: dict[str, bool], with_norm: bool, stage: int, layers: Iterator[int]
) -> Chain:
    """Give the blocks of a chain and their sites their roles, and the first block the unit."""
    links = Chain()
    for place in chain:
        slots: list[Slot] = []
        for site in place.sites if plugged[place.path] else ():
            norms = _norms(unit, place, site, with_norm)
            if not slots and place is chain[0]:  # has the norm of the unit itself
                norms.pop("unit_norm", None)
            for name, norm in reversed(list(norms.values())):
                _register_behind(place.block, site.path.partition(".")[0], name, norm)
            slots.append(
                Slot(
                    site.path,
                    site.before,
                    place.channels,
                    channel_axis=-1 if site.channels_last else 1,
                    batch_axis=place.batch_axis(site),
                    ndim=axes_of(place.block.get_submodule(site.path)),
                    branch_norm=norms.get("branch_norm", (None,))[0],
                    unit_norm=norms.get("unit_norm", (None,))[0],
                    stage=stage,
                    layer=next(layers),
                )
            )
            add_role(place.block.get_submodule(site.path), AttachedSite)
        vars(place.block)["dia_link"] = Link(links, place.path, tuple(slots), parameters_of(place.block), place.stream)
        add_role(place.block, AttachedBlock)
    chain[0].block.add_module("dia", unit)
    add_role(unit, AttachedUnit)
    return links


def _norms(unit: nn.Module, place: Place, site: Site, with_norm: bool) -> dict[str, tuple[str, nn.Module]]:
    """Return the norms that a block gets for a site, with their names, in the order in which they run."""
    norms: dict[str, nn.Module] = {}
    if with_norm and place.branch_norm:
        norms["branch_norm"] = nn.BatchNorm2d(place.channels)
    if isinstance(unit, AttentionUnit) and unit.norm is not None and not unit.share_norm:
        norms["unit_norm"] = copy.deepcopy(unit.norm)
    suffix = "" if len(place.sites) == 1 else f"_{site.path.replace('.', '_')}"
    return {kind: (f"{kind}{suffix}", _like(norm, place.block)) for kind, norm in norms.items()}


def _refuse_unfit_places(unit: nn.Module, chain: list[Place], with_norm: bool) -> None:
    for place in chain:
        for site in place.sites:
            place.batch_axis(site)
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


def _mask(plug: str | Sequence[bool | int] | None, stages: list[list[Place]]) -> list[bool]:
    """Return one truth value per block."""
    blocks = sum(len(stage) for stage in stages)
    if plug is None:
        return [True] * blocks
    if isinstance(plug, bool) or not isinstance(plug, Sequence):
        raise ValueError(f"plug takes one truth value per block, or a string such as '110|0011', got {plug!r}.")
    counts = [len(stage) for stage in stages]
    if isinstance(plug, str):
        plug = EAN_MASKS.get(plug, plug).replace(" ", "").replace(",", "")
        found = [len(part) for part in plug.split("|")]
        if len(found) > 1 and found != counts:
            raise ValueError(f"plug {plug!r} has stages of {_sum(found)} blocks, but the network has {_sum(counts)}.")
    values = [value for value in plug if value != "|"]
    wrong = [value for value in values if value not in ("0", "1", 0, 1)]
    if wrong:
        names = ", ".join(EAN_MASKS)
        given = f"{wrong[0]!r} in {plug!r}" if isinstance(plug, str) else repr(wrong[0])
        raise ValueError(f"plug takes 0 and 1 (or False and True), one per block, or one of {names}; got {given}.")
    if len(values) != blocks:
        raise ValueError(f"plug has {len(values)} entries, but the network has {blocks} blocks ({_sum(counts)}).")
    mask = [bool(int(value)) for value in values]
    if not any(mask):
        raise ValueError("plug leaves every block without attention. Do not attach any, or plug at least one block.")
    return mask


def _sum(counts: list[int]) -> str:
    return "+".join(map(str, counts))


def _nothing_to_attach_to(model: nn.Module, branches: Sequence[Branch] | None) -> str:
    found = sorted({type(module).__name__ for module in model.modules() if any(module.children())})
    known = ", ".join(sorted({name.rpartition(".")[0] for name in BLOCK_RULES}))
    if branches is not None and find_places(model, BLOCK_RULES, None):
        return f"No residual block of {type(model).__name__} has branches {list(branches)}. Leave `branches` out."
    return (
        f"No residual block is known in {type(model).__name__}, so there is nothing to attach to. Name the layers that "
        f"end its residual branches, as in sites=['blocks.*.conv2']. Modules that could be sites: "
        f"{possible_sites(model)}. It consists of: {', '.join(found) or 'no submodules'}. Known blocks: those of "
        f"{known}."
    )
