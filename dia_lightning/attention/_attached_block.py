"""A residual block with attention, and the module whose forward runs the blocks of a chain."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch.fx
from torch import nn

from dia_lightning.attention._attached_site import AttachedSite, site_in
from dia_lightning.attention._frame import Frame
from dia_lightning.attention._links import Chain, Link, Slot
from dia_lightning.attention._roles import Role, remove_role
from dia_lightning.attention._running import RUNNING, Scope
from dia_lightning.attention.description import saving


def _always(value: Any) -> property:
    """Return an attribute that reads as the value and ignores assignments."""
    return property(lambda module: value, lambda module, written: None)


def _layers(block: "AttachedBlock") -> Iterator[nn.Module]:
    own = own_names(block)
    return iter([module for name, module in block._modules.items() if name not in own and module is not None])


class AttachedBlock(Role):
    """Role of every block of a chain. The first one also holds the unit, as ``dia``."""

    rank = 1
    attributes: ClassVar = {
        nn.TransformerEncoderLayer: {"activation_relu_or_gelu": _always(0)},  # else a kernel would replace the layers
        nn.Sequential: {"__iter__": _layers, "__len__": lambda block: len(list(_layers(block)))},  # the unit is none
    }
    dia_links: tuple[Link, ...] = ()  # one per chain; none in a block made from another block's class
    dia: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, AttachedBlock):  # detached since torch.compile has kept this method
            return self(*args, **kwargs)
        if not self.dia_links or _is_traced(args, kwargs):  # torch.fx may take the block as a leaf
            return super().__call__(*args, **kwargs)
        return self._framed(self.dia_links, super().__call__, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame: Frame | None = RUNNING.frame
        if frame is not None and frame.block is self and not frame.begun:
            for _ in self.dia_links:  # each has a frame in this call
                frame.begun = True
                frame.arguments = args, kwargs  # as hooks on the block have changed them
                frame = frame.outer
            return super().forward(*args, **kwargs)
        if not self.dia_links:
            return super().forward(*args, **kwargs)
        if _is_traced(args, kwargs):
            raise RuntimeError(
                "torch.fx cannot trace through a block with shared attention. Make the block classes leaves: "
                f"create_feature_extractor(..., tracer_kwargs={{'leaf_modules': [{type(self).__name__}]}})."
            )
        # not by the call above: recomputed by a checkpoint inside of that, or called by its name
        return self._framed(self.dia_links, super().forward, args, kwargs, begun=True)

    def _framed(
        self,
        links: tuple[Link, ...],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        begun: bool = False,
    ) -> Any:
        sites = [site_in(self, slot) for slot in links[0].slots]
        with Frame(self, links[0], sites, args, kwargs, begun) as frame:
            output = self._framed(links[1:], run, args, kwargs, begun) if links[1:] else run(*args, **kwargs)
        frame.hand_on(output)
        return output

    def dia_slots(self) -> list[Slot]:
        """Return the slots of the block."""
        return [slot for link in self.dia_links for slot in link.slots]

    def dia_sites(self) -> list[nn.Module]:
        """Return the layers in the slots of the block."""
        return [site_in(self, slot) for slot in self.dia_slots()]

    def dia_units(self) -> list[nn.Module]:
        """Return the units of the chains that begin in the block."""
        return [self.get_submodule(link.unit) for link in self.dia_links if link.before is None]

    def dia_taken_out(self) -> list[str]:
        """Return the paths of the slots from which the network's own attention module was removed."""
        kept = vars(self).get("dia_kept", {})
        return [slot.path for slot in self.dia_slots() if slot.is_whole or slot.path in kept]

    def dia_rename(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename the keys of version 0.1 in a state dict, which kept the norms of a site under the site."""
        for slot in self.dia_slots():
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


def _in_scope(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method that is called by name, such as a Lightning step, open the scope of its module."""

    @functools.wraps(method)  # exporters and Lightning read the signature
    def run(owner: "ChainOwner", *args: Any, **kwargs: Any) -> Any:
        scope = RUNNING.scope
        if scope is not None and scope.chains is owner.dia_chains:
            return method(owner, *args, **kwargs)
        with Scope(owner.dia_chains):
            return method(owner, *args, **kwargs)

    return run


class ChainOwner(Role):
    """Role of a module whose forward runs the blocks of chains."""

    rank = 0
    equals_plain = True
    decorated: ClassVar = {
        **dict.fromkeys(("forward", "training_step", "validation_step", "test_step", "predict_step"), _in_scope),
        "save_pretrained": saving,
    }
    attributes: ClassVar = {nn.TransformerEncoder: {"use_nested_tensor": _always(False)}}  # as those kernels need
    dia_chains: Sequence[Chain] = ()  # a slice of a sequence has none

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, ChainOwner):  # as above
            return self(*args, **kwargs)
        with Scope(self.dia_chains):
            return super().__call__(*args, **kwargs)


def take_apart(module: nn.Module) -> None:
    """Remove all attention roles from a module, and what they added."""
    for role in (AttachedSite, AttachedBlock, ChainOwner):
        if isinstance(module, role):
            remove_role(module, role)
    for name in own_names(module):
        module._modules.pop(name, None)
    for name in ("dia_links", "dia_chains"):
        vars(module).pop(name, None)


def is_attached(network: nn.Module) -> bool:
    """Return whether a network, or a part of it, has attention attached.

    The network's own attention modules do not count.

    Args:
        network: any network.

    Example:
        >>> from dia_lightning.attention import attach, detach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=11), "dia-lstm")
        >>> is_attached(network), is_attached(detach(network))
        (True, False)
    """
    return any(isinstance(module, AttachedBlock) for module in network.modules())


def own_names(block: nn.Module) -> set[str]:
    """Return the names under which attention has registered modules in a block."""
    links: tuple[Link, ...] = vars(block).get("dia_links", ())
    names = {link.unit for link in links if link.before is None}
    norms = {name for link in links for slot in link.slots for name in (slot.branch_norm, slot.unit_norm)}
    return names | {name for name in norms if name is not None}


def _is_traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values()))
