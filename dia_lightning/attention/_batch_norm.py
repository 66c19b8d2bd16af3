"""Batch norms whose output is not saved: backward computes what it needs of it from their input."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dia_lightning.attention._roles import plain_class

#: Classes that are known, with the number of axes that they take.
BATCH_NORMS: dict[type[nn.Module], int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}

#: Number of leading entries of a call that are tensors.
TENSORS = 5


class NormCall(NamedTuple):
    """What a batch norm was called with, and what it computed.

    Args:
        x: its input ``[B, C, ...]``.
        weight: of the norm ``[C]``.
        bias: of the norm ``[C]``.
        shift: mean that was subtracted ``[C]``.
        factor: inverse of the standard deviation, multiplied next ``[C]``.
        eps: of the norm.
        of_batch: whether mean and standard deviation are those of the batch.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor
    factor: Tensor
    eps: float
    of_batch: bool

    def output(self) -> Tensor:
        """Compute the output again in a way that autograd can follow."""
        if self.of_batch and torch.is_grad_enabled():
            return torch.batch_norm(self.x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)
        variance = self.factor.pow(-2) - self.eps
        return torch.batch_norm(self.x, self.weight, self.bias, self.shift, variance, False, 0.0, self.eps, False)


def moments(gradient: Tensor, features: Tensor, shift: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum(gradient)`` and ``sum(gradient * (features - shift) * factor)`` over positions, each ``[B, C]``.

    The backward pass of a batch norm computes these for its weights; here each sample gets its own norm. This takes one
    pass, where a product and a sum take three.

    Args:
        gradient: ``[B, C, ...]``, contiguous.
        features: ``[B, C, ...]``, contiguous.
        shift: ``[B * C]``; contiguous, as the kernel assumes.
        factor: ``[B * C]``, likewise.
    """
    shape = features.shape[:2]
    rows = 1, shape.numel(), -1
    precise = torch.promote_types(features.dtype, torch.float32)
    shift, factor = shift.to(precise), factor.to(precise)
    _, moment, total = torch.ops.aten.native_batch_norm_backward(
        gradient.view(rows), features.view(rows), factor, None, None, shift, factor, True, 0.0, [False, True, True]
    )
    return total.view(shape), moment.view(shape)


def can_run(site: nn.Module, x: Any) -> bool:
    """Return whether a layer is a batch norm that :func:`run` supports, and autograd records it."""
    norm: Any = site
    return (
        type(x) is Tensor
        and x.ndim == BATCH_NORMS.get(plain_class(site))
        and x.numel() > x.shape[1]  # else the norm itself raises
        and norm.weight is not None
        and norm.bias is not None
        and norm.momentum is not None
        and (x.requires_grad or norm.weight.requires_grad)
    )


def run(norm: Any, x: Tensor) -> tuple[Tensor, NormCall]:
    """Run a batch norm, bypassing its ``forward``, which returns only the output."""
    of_batch = norm.training or norm.running_mean is None
    running = (norm.running_mean, norm.running_var) if norm.track_running_stats or not norm.training else (None, None)
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    # what the norm itself ends up calling; no other function both chooses the kernel for the device and returns mean
    # and deviation
    output, shift, factor, *_ = torch.ops.aten._batch_norm_impl_index(
        x, norm.weight, norm.bias, *running, of_batch, norm.momentum, norm.eps, torch.backends.cudnn.enabled
    )
    if not of_batch:
        # a copy: a training-mode forward before backward would change the mean, and the kernel does not bump versions
        shift, factor = norm.running_mean.clone(), (norm.running_var + norm.eps).rsqrt()
    return output, NormCall(x, norm.weight, norm.bias, shift, factor, norm.eps, of_batch)
