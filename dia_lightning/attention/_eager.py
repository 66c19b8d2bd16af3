"""Whether code runs as it is written, and nobody but autograd follows it."""

import torch
from torch.autograd import forward_ad


def is_eager() -> bool:
    """Tell whether nothing but autograd follows what runs: no compiler, no transform of ``torch.func``, no tracer."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )
