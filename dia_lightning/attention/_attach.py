"""Attach attention to a network and detach it again."""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from dia_lightning._choices import check_choice
from dia_lightning.attention._attached_block import is_attached, take_apart
from dia_lightning.attention._find import refuse_unfit
from dia_lightning.attention._masks import plugged
from dia_lightning.attention._own_attention import SharedModule
from dia_lightning.attention._places import Existing, Place, Sites, own_modules, places
from dia_lightning.attention._registry import attention_builder
from dia_lightning.attention._sites import Branch
from dia_lightning.attention._unit import AttentionUnit, start_at_zero
from dia_lightning.attention._wiring import (
    let_go,
    like,
    put_back,
    refuse_unfit_places,
    take_out,
    wire,
)
from dia_lightning.attention.description import describe, remember
from dia_lightning.attention.inspection import parameters_saved

_LOG = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    attention: str | Callable[..., nn.Module] | None,
    *,
    example: Any = None,
    share: Literal["stage", "block"] = "stage",
    plug: str | Sequence[bool | int] | None = None,
    identity: bool = False,
    branch_norm: bool | None = None,
    branches: Sequence[Branch] | None = None,
    sites: Sites | None = None,
    existing: Existing = "keep",
    existing_start: Literal["mean", "first"] = "mean",
    **attention_args: Any,
) -> Model:
    """Attach attention to the residual blocks of a network, in place.

    Every block's residual branch is multiplied by an attention map just before it is added to the shortcut. Weights
    of the plain network load into the attached one; only the unit's keys are missing, unless ``existing`` removes
    modules of the network. :func:`detach` restores the plain network.

    Args:
        model: the network, or any module that contains one, for example a ``LightningModule``.
        attention: a registered name (see :func:`list_attention` and :func:`register_attention`), or a callable
            ``channels -> nn.Module``. Its modules map ``(features [B, C, H, W], state)`` to ``(map, state)``; see
            :class:`AttentionUnit` for tokens, sequences and volumes. A callable that takes ``spatial_dims`` is given 3
            for volumes and video, else 2. ``None`` only with ``existing="share"``.
        example: input of the network's forward: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments. A copy of the network runs on it to find the residual branches (see :func:`find_sites`).
            Networks of this package, torchvision, timm, diffusers and transformers, and modules with
            ``example_input_array``, need none.
        share: ``"stage"`` for one unit per stage, shared by its blocks (DIA), or ``"block"`` for one unit per block.
        plug: which blocks get attention: one boolean per block in order, a string such as ``"110|0011"``, or the name
            of a mask in :data:`EAN_MASKS`. Blocks that are left out pass the state on unchanged. Every block by
            default.
        identity: start with every map equal to 1, so that the network computes what it did before, except for modules
            that ``existing`` removes. The default is the paper's start, where DIA-LSTM maps are near 1/4.
        branch_norm: whether branches that do not end in a norm (pre-activation networks) get a batch norm before the
            unit, as in the authors' code. A plain control arm lacks these norms: compare with ``branch_norm=False``
            where it matters. True by default unless ``identity`` is set.
        branches: which branches: a list of ``"conv"``, ``"attention"`` and ``"mlp"``. All by default; in diffusers
            U-Nets only the residual blocks, unless ``["conv", "attention"]`` asks for both.
        sites: layers whose output ends a residual branch, instead of the automatically found ones: patterns of module
            paths such as ``"encoder.*.conv2"``, a function ``(path, module) -> bool``, or a list of lists of patterns,
            one per group that shares a unit. The block of a layer is the repeated module around it, or else the
            nearest one that is not a plain container. With an ``example``, order, width and axes come from a run;
            without one, from the layers' attributes.
        existing: what to do with the network's own attention modules, such as squeeze-and-excitation: ``"keep"`` them;
            ``"replace"`` them with units, in their places instead of at the ends of branches; or ``"share"`` one of
            them among the blocks of a stage whose modules have weights of the same shapes, in addition to attention at
            the ends of branches, or alone if ``attention`` is ``None``; the saving is logged. :func:`detach` undoes
            both; blocks that shared a module get copies of it.
        existing_start: initial weights of a shared module: the ``"mean"`` of those in the stage, or the ``"first"``.
        **attention_args: further arguments of the attention module, for example ``reduction=8``.

    Returns:
        The same object, with attention.

    Raises:
        ValueError: if attention is already attached, the network is wrapped, sharded or compiled, does not run on the
            example or has no residual branch, a name that the attention needs is taken, or an argument is invalid.

    Source:
        arXiv 2210.16101 and 1905.10671; masks of blocks from arXiv 2011.14058. The identity start is this package's
        own.

    Example:
        >>> from dia_lightning.models import get_model
        >>> model = attach(get_model("cifar_resnet", depth=29, num_classes=10), "dia-lstm", reduction=4)
        >>> [name for name, _ in model.named_modules() if name.endswith(".dia")]
        ['layer1.0.dia', 'layer2.0.dia', 'layer3.0.dia']
    """
    arguments = {name: value for name, value in locals().items() if name not in ("model", "attention_args")}
    refuse_unfit(model)
    check_choice("share", share, ("stage", "block"))
    if identity and branch_norm:
        raise ValueError(
            "identity=True and branch_norm=True contradict each other: an added norm changes what the network computes."
        )
    check_choice("existing", existing, get_args(Existing))
    check_choice("existing_start", existing_start, ("mean", "first"))
    if attention is None and existing != "share":
        raise ValueError("attention is None: name what to attach, or share the network's own with existing='share'.")
    planned: list[tuple[nn.Module, list[Place], int]] = []  # unit, chain, stage; complete before we touch the network
    if attention is not None:
        build = attention_builder(attention, attention_args)
        stages = places(model, example=example, branches=branches, sites=sites, existing=existing)
        with_norm = not identity if branch_norm is None else branch_norm
        for number, stage in enumerate(_plugged(stages, plug, with_norm)):
            planned += [(_new_unit(build, chain[0], identity), chain, number) for chain in _chains(stage, share)]
        if share == "stage":
            _warn_of_single([chain for _, chain, _ in planned if sites is None or len(chain[0].sites) == 1])
    if existing == "share":
        first = max((number for *_, number in planned), default=-1) + 1
        for number, chain in enumerate(own_modules(model, example), start=first):
            modules = [model.get_submodule(site.path) for place in chain for site in place.sites]
            planned.append((SharedModule(modules, existing_start), chain, number))
    for unit, chain, _ in planned:
        refuse_unfit_places(unit, chain)
    try:
        for unit, chain, _ in planned:
            if existing == "replace" or isinstance(unit, SharedModule):
                take_out(model, chain)
        layers = count()
        for unit, chain, number in planned:
            wire(model, unit, chain, number, layers)
        for unit, chain, _ in planned:
            if isinstance(unit, SharedModule):
                let_go(chain)
    except BaseException:
        _take_all_apart(model)
        raise
    remember(model, describe({**arguments, **attention_args}, attach.__kwdefaults__ or {}))
    if existing == "share":
        _LOG.info("existing='share' saves %s parameters of attention modules.", f"{parameters_saved(model):,}")
    return model


def detach(model: Model) -> Model:
    """Remove attention from a network, in place, and return the plain network.

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
    if not is_attached(model):
        raise ValueError("No attention is attached to this network.")
    _take_all_apart(model)
    return model


def _take_all_apart(model: nn.Module) -> None:
    put_back(model)
    for module in list(model.modules()):
        take_apart(module)


def _plugged(
    stages: list[list[Place]], plug: str | Sequence[bool | int] | None, with_norm: bool
) -> Iterator[list[Place]]:
    """Yield the stages, with whether each block is plugged and whether it gets a norm."""
    mask = iter(plugged(plug, [len(stage) for stage in stages]))
    for stage in stages:
        yield [
            replace(
                place,
                is_plugged=next(mask),
                rule=replace(place.rule, branch_norm=place.rule.branch_norm and with_norm),
            )
            for place in stage
        ]


def _chains(stage: list[Place], share: str) -> list[list[Place]]:
    """Group the blocks of a stage that share a unit. A chain begins and ends with a plugged block."""
    inside = [index for index, place in enumerate(stage) if place.is_plugged]
    if share == "block":
        return [[stage[index]] for index in inside]
    return [stage[inside[0] : inside[-1] + 1]] if inside else []


def _warn_of_single(chains: list[list[Place]]) -> None:
    single = [chain[0] for chain in chains if len(chain) == 1]
    if single:
        listed = [f"{place.sites[0].path} ({place.size})" for place in single[:5]]
        warnings.warn(
            f"{len(single)} of {len(chains)} units serve a single block, so nothing is shared there: "
            f"{', '.join(listed)}{', ...' if len(single) > 5 else ''}. Consecutive blocks share a unit if they have "
            "the same width and number of positions and `plug` includes them. Or name a group, as in "
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
    if place.rule.zero_bias and isinstance(unit, AttentionUnit):  # a custom unit chooses its own start
        for layer in unit.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                start_at_zero(layer, ["bias"])
    if identity:
        if not isinstance(unit, AttentionUnit):
            raise ValueError(
                f"identity=True needs an attention module with start_at_identity(), as subclasses of "
                f"dia_lightning.attention.AttentionUnit have; {type(unit).__name__} is not one."
            )
        unit.start_at_identity()
    try:
        inspect.signature(unit.forward).bind(None, None)
    except TypeError:
        raise ValueError(
            f"{type(unit).__name__}.forward must take (features, state) and return (map, state), where the state may "
            f"be None; it takes {inspect.signature(unit.forward)}."
        ) from None
    return like(unit, place.block)
