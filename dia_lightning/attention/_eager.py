"""Whether code runs as it is written, and who sees what it does."""

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from dia_lightning.attention._roles import plain_class

#: Layers that put out a new tensor, and their own ``forward``, which others may replace.
_FRESH: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        nn.Linear,
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
    )
}


def is_eager() -> bool:
    """Tell whether nothing but autograd follows what runs: no compiler, transform of ``torch.func``, tracer, mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or forward_ad._current_level >= 0
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    )


def is_recorded() -> bool:
    """Tell whether a mode sees every operation, so that it may keep what one puts out."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_unseen(layer: nn.Module) -> bool:
    """Tell whether a layer puts out a new tensor that nobody but its caller has, so that it may be changed."""
    kind = plain_class(layer)
    return kind in _FRESH and kind.forward is _FRESH[kind] and is_unhooked(layer)


def is_unhooked(module: nn.Module) -> bool:
    """Tell whether nobody sees what a module is given and puts out."""
    return not (
        (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or "forward" in vars(module)
    )
