"""The layer that ends a residual branch, left in place and multiplied by the attention map of the running block."""

from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.attention._attached_unit import attend
from dia_lightning.attention._eager import is_eager, is_recorded, is_unhooked, is_unseen
from dia_lightning.attention._frame import Frame
from dia_lightning.attention._links import Slot
from dia_lightning.attention._own_attention import watched
from dia_lightning.attention._padding import mean_of_real, real_tokens
from dia_lightning.attention._recalibration import Squeezed, normalized, recalibrated, squeezed
from dia_lightning.attention._roles import Role, add_role, plain_class, remove_role
from dia_lightning.attention._running import RUNNING, is_recomputed


class AttachedSite(Role):
    """Role of the layer in a slot: its output, or its input, is multiplied by the attention map."""

    rank = 3
    equals_plain = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, AttachedSite):  # detached since torch.compile has kept this method
            return self(*args, **kwargs)
        places = _places_of(self)
        for frame, slot in places:
            if slot.before and args:
                args = _recalibrated(args[0], frame, slot), *args[1:]
            elif slot.before:
                name, features = next(iter(kwargs.items()))
                kwargs = {**kwargs, name: _recalibrated(features, frame, slot)}
        after = [(frame, slot) for frame, slot in places if not slot.before]
        is_own = len(after) == 1 and is_eager() and is_unseen(self) and _forgets(after[0][0].unit)
        squeeze = None
        if is_own and len(args) == 1 and not kwargs and _takes_mean(*after[0], args[0]):
            squeeze = normalized(self, args[0]) if after[0][1].is_channels_second else None
        output = super().__call__(*args, **kwargs) if squeeze is None else squeeze.features
        for frame, slot in after:
            output = _recalibrated(output, frame, slot, is_own, squeeze)
        return output


def site_in(block: nn.Module, slot: Slot) -> nn.Module:
    """Return the layer in a slot of a block; one placed there after ``attach`` gets attention from now on.

    Raises:
        RuntimeError: if there is no layer, or it would have to change in the middle of a compilation.
    """
    site: nn.Module | None = block
    for name in slot.path.split("."):
        site = None if site is None else site._modules.get(name)
    if site is None:
        raise RuntimeError(
            f"Attention belongs to {slot.path!r} of a {type(block).__name__}, but nothing is there any more: was the "
            "block fused or reparametrised after attach()? detach() the network before that."
        )
    if not isinstance(site, AttachedSite):
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"The layer {slot.path!r} of a {type(block).__name__} was replaced after attach(). Run the network "
                "once before compiling or exporting it."
            )
        kept = {id(module) for inner in site.modules() for module in getattr(inner, "dia_sites", list)()}
        for module in site.modules():  # the layer that was here before may be a part of the new one, as in LoRA
            if isinstance(module, AttachedSite) and id(module) not in kept:
                remove_role(module, AttachedSite)
        add_role(site, AttachedSite)
    return site


def _places_of(site: nn.Module) -> list[tuple[Frame, Slot]]:
    """Return the frames of the running block call that has the site in a slot, and the slots; none if none runs.

    Raises:
        RuntimeError: if a network with attention runs the site outside its block.
    """
    frame: Frame | None = RUNNING.frame
    found: list[tuple[Frame, Slot]] = []
    while frame is not None and not (found and frame.block is not found[0][0].block):
        for slot, module in zip(frame.link.slots, frame.sites, strict=True):
            if module is site and not any(slot is other for _, other in found):
                found.append((frame, slot))
        frame = frame.outer
    if found:
        return found
    name = type(site).__name__
    if is_recomputed():
        raise RuntimeError(
            f"A {name} with attention was recomputed in backward without its block: the block checkpoints part of "
            "itself. Turn that off and checkpoint the whole block, with use_reentrant=False."
        )
    if RUNNING.frame is not None or RUNNING.scope is not None:
        raise RuntimeError(
            f"A {name} with attention was called outside its block, or moved within it, so there is no attention state "
            "for it. Call the block, or detach() the network before changing it."
        )
    return []  # someone runs the layer alone


def _takes_mean(frame: Frame, slot: Slot, features: Any) -> bool:
    """Return whether only autograd observes what runs, and the unit takes the mean of unchanged features."""
    return (
        torch.is_grad_enabled()
        and is_eager()
        and isinstance(features, Tensor)
        and slot.branch_norm is None
        and frame.placement in (None, (features.device, features.dtype))
        and getattr(frame.unit, "takes_mean", False)
        and is_unhooked(frame.unit)  # a hook may change the features, or differentiate them
    )


def _forgets(unit: nn.Module) -> bool:
    """Return whether no one else holds the features once a unit has made their map.

    A custom unit may keep them as its state. Those of the package do not, and pass them to no layer whose hooks would
    see them.
    """
    return plain_class(unit).__module__.startswith("dia_lightning.") and is_unhooked(unit)


def _recalibrated(
    features: Any, frame: Frame, slot: Slot, is_own: bool = False, squeeze: Squeezed | None = None
) -> Any:
    """Return features multiplied by their attention map; of a tuple, as returned by attention layers, the first.

    Args:
        features: output or input of the site.
        frame: of the block.
        slot: of the site.
        is_own: whether no one else holds the features.
        squeeze: their mean, if it is known.
    """
    if isinstance(features, tuple):
        entries = (_recalibrated(features[0], frame, slot), *features[1:])
        return type(features)(*entries) if hasattr(features, "_fields") else entries
    frame.note_run(slot)
    if slot.is_whole:
        return watched(frame.unit, features, watcher=slot.watcher)
    _refuse_unfit(features, frame, slot)
    if slot.branch_norm is not None:
        features = frame.block.get_submodule(slot.branch_norm)(features)
    channel, batch = slot.channel_axis, slot.batch_axis
    is_plane = features.ndim > 3
    planes = features if slot.is_channels_second else features.movedim((batch, channel), (0, 1))  # [B, C, ...]
    planes = planes if is_plane else planes.unsqueeze(-1)  # tokens are a plane of width one: [B, C, N, 1]
    valid = None if is_plane else real_tokens(frame, planes.shape[0], planes.shape[2])
    if squeeze is None and valid is None and _takes_mean(frame, slot, planes):
        squeeze = squeezed(planes)
    if squeeze is not None:
        product = recalibrated(squeeze, attend(frame, slot, planes, squeeze.mean))
    else:
        mean = None if valid is None else mean_of_real(frame.unit, planes, valid)
        attention_map = attend(frame, slot, planes, mean)
        is_free = is_own and not torch.is_grad_enabled() and not is_recorded()
        may_change = is_free and attention_map.dtype == planes.dtype
        product = planes.mul_(attention_map) if may_change else planes * attention_map
    product = product if is_plane else product.squeeze(-1)
    return product if slot.is_channels_second else product.movedim((0, 1), (batch, channel))


def _refuse_unfit(features: Any, frame: Frame, slot: Slot) -> None:
    """Refuse anything but features ``[B, C, ...]`` in the layout of the slot.

    Raises:
        RuntimeError: if it is anything else.
    """
    channel = slot.channel_axis
    is_dense = isinstance(features, Tensor) and not features.is_nested
    fits = is_dense and features.ndim > 2 and features.ndim == (slot.ndim or features.ndim)
    if not fits or features.is_quantized or features.shape[channel] != slot.channels:
        axes = f"[B, {slot.channels}, ...]" if channel == 1 else f"[B, ..., {slot.channels}]"
        kind = f"{'quantized ' if is_dense and features.is_quantized else ''}{type(features).__name__}"
        raise RuntimeError(
            f"Attention at {slot.path!r} of a {type(frame.block).__name__} needs features {axes}"
            f"{f' of {slot.ndim} axes' if slot.ndim else ''}, got a {kind}"
            f"{f' of shape {tuple(features.shape)}' if is_dense else ''}. If the layer does not end a residual branch, "
            "leave it out of `sites`."
        )
