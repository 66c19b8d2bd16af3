"""Values that need more than half precision."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or unchanged if it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
