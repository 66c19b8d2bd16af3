"""Memory of a training step."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Return the bytes that a forward keeps for backward, each storage counted once.

    Tensors that an ``autograd.Function`` keeps as attributes of its context are not seen by autograd's hooks.

    Args:
        forward: returns the loss.
        own: parameters and buffers, which are not counted.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # keeps the tensors alive, so that no address is reused
    del loss
    return sum(kept.values())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the peak of GPU memory in a step beyond what was allocated before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
