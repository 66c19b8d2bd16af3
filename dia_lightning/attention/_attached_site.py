"""The layer that ends a residual branch, in its own place, multiplied by the attention map of the running block."""

from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.attention._attached_unit import attend
from dia_lightning.attention._links import Slot
from dia_lightning.attention._padding import real_tokens
from dia_lightning.attention._roles import Role, add_role, remove_role
from dia_lightning.attention._running import RUNNING, Frame, backward_task


class AttachedSite(Role):
    """Role of the layer in a slot: its output, or its input, is multiplied by the attention map."""

    rank = 3
    equals_plain = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place = _place_of(self)
        if place is None:
            return super().__call__(*args, **kwargs)
        frame, slot = place
        if not slot.before:
            return _recalibrated(super().__call__(*args, **kwargs), frame, slot)
        return super().__call__(_recalibrated(args[0], frame, slot), *args[1:], **kwargs)


def site_in(block: nn.Module, slot: Slot) -> nn.Module:
    """Return the layer in a slot of a block; one that was put there after ``attach`` gets attention from now on.

    Raises:
        RuntimeError: if there is no layer, or it would have to change in the middle of a compilation.
    """
    site: nn.Module | None = block
    for name in slot.path.split("."):
        site = None if site is None else site._modules.get(name)
    if site is None:
        raise RuntimeError(
            f"Attention belongs to {slot.path!r} of a {type(block).__name__}, and nothing is there any more: was the "
            "block fused or reparametrised after attach()? detach() the network before that."
        )
    if not isinstance(site, AttachedSite):
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"The layer {slot.path!r} of a {type(block).__name__} was replaced after attach(). Run the network "
                "once before you compile or export it."
            )
        kept = {id(module) for inner in site.modules() for module in getattr(inner, "dia_sites", list)()}
        for module in site.modules():  # the layer that was here before may be a part of the new one, as in LoRA
            if isinstance(module, AttachedSite) and id(module) not in kept:
                remove_role(module, AttachedSite)
        add_role(site, AttachedSite)
    return site


def _place_of(site: nn.Module) -> tuple[Frame, Slot] | None:
    """Return the running call of a block that has the site in a slot, and the slot; ``None`` if nothing runs.

    Raises:
        RuntimeError: if a network with attention runs the site outside of its block.
    """
    frame = RUNNING.frame
    while frame is not None:
        for slot, module in zip(frame.link.slots, frame.sites, strict=True):
            if module is site:
                return frame, slot
        frame = frame.outer
    if backward_task() != -1:
        raise RuntimeError(
            f"A {type(site).__name__} with attention was recomputed in backward without its block: the block "
            "checkpoints a part of itself. Switch that off and checkpoint the whole block, with use_reentrant=False."
        )
    if RUNNING.frame is not None or RUNNING.scope is not None:
        raise RuntimeError(
            f"A {type(site).__name__} with attention was called outside of its block, so there is no attention state "
            "for it. Call the block, or detach() the network first."
        )
    return None  # somebody looks at the layer alone


def _recalibrated(features: Any, frame: Frame, slot: Slot) -> Any:
    """Return features multiplied by their attention map; of a tuple, as attention layers return, the first."""
    frame.ran += 1
    frame.grad = frame.grad and torch.is_grad_enabled()
    if isinstance(features, tuple):
        return (_recalibrated_tensor(features[0], frame, slot), *features[1:])
    return _recalibrated_tensor(features, frame, slot)


def _recalibrated_tensor(features: Any, frame: Frame, slot: Slot) -> Tensor:
    if not isinstance(features, Tensor) or features.is_nested:
        kind = "a nested tensor" if isinstance(features, Tensor) else type(features).__name__
        raise RuntimeError(
            f"Attention at {slot.path!r} of a {type(frame.block).__name__} needs a tensor of features, got {kind}. "
            "Leave the layer out of `sites`."
        )
    if features.ndim < 3:
        raise RuntimeError(
            f"Features of shape {tuple(features.shape)} have no positions to attend to: {slot.path!r} of a "
            f"{type(frame.block).__name__} does not end a residual branch. Leave it out of `sites`."
        )
    if features.shape[slot.channel_axis] != slot.channels:
        axes = f"[B, {slot.channels}, ...]" if slot.channel_axis == 1 else f"[B, ..., {slot.channels}]"
        raise RuntimeError(
            f"Attention at {slot.path!r} of a {type(frame.block).__name__} needs features {axes}, got shape "
            f"{tuple(features.shape)}: its channels lie on another axis. "
            "Leave it out of `sites`."
        )
    if slot.branch_norm is not None:
        features = frame.block.get_submodule(slot.branch_norm)(features)
    axes_of = slot.batch_axis, slot.channel_axis
    planes = features if axes_of == (0, 1) else features.movedim(axes_of, (0, 1))  # [B, C, ...]
    if planes.ndim > 3:
        attention_map = attend(frame, slot, planes, None)
    else:  # tokens are a plane of width one: [B, C, N, 1]
        valid = real_tokens(frame, len(planes), planes.shape[2])
        attention_map = attend(frame, slot, planes.unsqueeze(-1), valid).squeeze(-1)
    recalibrated: Tensor = features * (attention_map if axes_of == (0, 1) else attention_map.movedim((0, 1), axes_of))
    return recalibrated
