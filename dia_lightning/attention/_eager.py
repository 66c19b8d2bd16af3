"""Whether code runs as written, and whether anything observes it."""

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from dia_lightning.attention._roles import plain_class

#: Layers that return a new tensor, with their original ``forward``, which others may replace.
_FRESH: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        nn.Linear,
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
    )
}


def is_eager() -> bool:
    """Return whether only autograd observes what runs: no compiler, ``torch.func`` transform, tracer or mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or forward_ad._current_level >= 0
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    )


def is_recorded() -> bool:
    """Return whether a mode sees every operation and may keep its output."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_unseen(layer: nn.Module) -> bool:
    """Return whether a layer returns a new tensor that only its caller holds, so that it may be changed."""
    kind = plain_class(layer)
    return kind in _FRESH and kind.forward is _FRESH[kind] and is_unhooked(layer)


def is_unhooked(module: nn.Module) -> bool:
    """Return whether nothing observes the inputs and outputs of a module."""
    return not (
        (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or "forward" in vars(module)
    )
