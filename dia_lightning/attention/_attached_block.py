"""A residual block with attention, and the module whose forward runs the blocks of a chain."""

from collections.abc import Sequence
from typing import Any

import torch.fx
from torch import nn

from dia_lightning.attention._attached_site import AttachedSite, site_in
from dia_lightning.attention._links import Chain, Link
from dia_lightning.attention._roles import Role, remove_role
from dia_lightning.attention._running import RUNNING, Frame, Scope


class AttachedBlock(Role):
    """Role of every block of a chain. The first one also holds the unit, as ``dia``."""

    rank = 1
    dia_link: Link
    dia: nn.Module

    @classmethod
    def class_attributes(cls, plain: type[nn.Module]) -> dict[str, Any]:
        # In evaluation a fused kernel would take the place of the layers.
        return {"activation_relu_or_gelu": _always(0)} if issubclass(plain, nn.TransformerEncoderLayer) else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_traced(args, kwargs):
            return super().__call__(*args, **kwargs)  # as a leaf
        with Frame(self, self.dia_link, self.dia_sites(), args, kwargs) as frame:
            output = super().__call__(*args, **kwargs)
        frame.hand_on(output)
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame = RUNNING.frame
        if frame is not None and frame.block is self and not frame.begun:
            frame.begun = True
            return super().forward(*args, **kwargs)
        # not through the call above: recomputed by a checkpoint inside of it, or called by name
        if _is_traced(args, kwargs):
            raise RuntimeError(
                "torch.fx cannot trace through a block with shared attention. Make the block classes leaves, for "
                "example create_feature_extractor(..., tracer_kwargs={'leaf_modules': [type(model.layer1[0])]})."
            )
        with Frame(self, self.dia_link, self.dia_sites(), args, kwargs) as frame:
            frame.begun = True
            output = super().forward(*args, **kwargs)
        frame.hand_on(output)
        return output

    def dia_sites(self) -> list[nn.Module]:
        """Return the layers in the slots of the block."""
        return [site_in(self, slot) for slot in self.dia_link.slots]

    def dia_rename(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename the keys of version 0.1 in a state dict, where the norms of a site stood under the site."""
        for slot in self.dia_link.slots:
            for kind, name in (("branch_norm", slot.branch_norm), ("unit_norm", slot.unit_norm)):
                old = f"{prefix}{slot.path}.{kind}."
                for key in [key for key in state_dict if name is not None and key.startswith(old)]:
                    state_dict[f"{prefix}{name}.{key.removeprefix(old)}"] = state_dict.pop(key)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.dia_rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "torch.jit.script cannot compile blocks with shared attention. Use torch.export, torch.compile or "
            "torch.jit.trace, or detach() the network first."
        )


class ChainOwner(Role):
    """Role of a module whose forward runs the blocks of chains."""

    rank = 0
    equals_plain = True
    dia_chains: Sequence[Chain] = ()  # a slice of a sequence has none

    @classmethod
    def class_attributes(cls, plain: type[nn.Module]) -> dict[str, Any]:
        # Padded batches would be packed for the fused kernel of the layers.
        return {"use_nested_tensor": _always(False)} if issubclass(plain, nn.TransformerEncoder) else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with Scope(self.dia_chains):
            return super().__call__(*args, **kwargs)


def take_apart(module: nn.Module) -> None:
    """Take every role of attention and what belongs to it away from a module."""
    if isinstance(module, AttachedSite):
        remove_role(module, AttachedSite)
    if isinstance(module, AttachedBlock):
        remove_role(module, AttachedBlock)
        names = [name for slot in module.dia_link.slots for name in (slot.branch_norm, slot.unit_norm)]
        for name in ("dia", *names):
            module._modules.pop(name, None)  # type: ignore[arg-type]  # no module is called None
        del module.dia_link
    if isinstance(module, ChainOwner):
        remove_role(module, ChainOwner)
        vars(module).pop("dia_chains", None)


def _always(value: Any) -> property:
    """Return an attribute that reads as the value; what is written waits behind it for the plain class."""

    def write(self: nn.Module, written: Any) -> None:
        pass

    return property(lambda self: value, write)


def _is_traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values()))
