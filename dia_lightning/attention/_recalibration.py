"""Squeeze and recalibration of a branch, in as few passes over its features as autograd allows.

For a unit that only uses the mean over positions, the plain formulation is ``y * unit(y.mean())``. Its backward pass
makes five tensors of the size of ``y``, which is saved for it. Two autograd functions, with the unit running between
them, make one: :class:`_Recalibrate` computes the gradient of the map, and :class:`_Squeeze` that of ``y``, once that
of the mean is known. The inputs for this arrive as the "gradient" of placeholders, so autograd keeps the order however
the graph is run.

Where a batch norm, which saves its own input anyway, outputs ``y``, ``y`` is multiplied in place and not saved: the
gradient of the map is computed from that input. Saved-tensor hooks that copy, as for offloading, see it twice.

Outputs match the plain formulation bit for bit. That one still runs where compilers fuse it, where something else
observes what runs (``torch.func``, forward-mode differentiation), and for small features, where calls cost more than
passes.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dia_lightning.attention._batch_norm import TENSORS, NormCall, can_run, moments, run
from dia_lightning.attention._eager import is_eager, is_recorded
from dia_lightning.attention._unit import beside, mean_over_positions

#: Number of feature entries from which the functions are faster than the plain formulation: on a CPU, and on any other
#: device, where a launch takes as long as a pass over millions of entries. Measured, see docs/performance.md.
SMALL_ON_CPU, SMALL = 2**18, 2**24


class Squeezed(NamedTuple):
    """Features, and their mean.

    Args:
        features: ``[B, C, ...]``.
        mean: over positions ``[B, C]``.
        of_output: placeholder for the gradient of the product, of its shape.
        of_map: placeholder for the map ``[B, C]``.
        norm: the batch norm that returned the features, if any.
    """

    features: Tensor
    mean: Tensor
    of_output: Tensor
    of_map: Tensor
    norm: NormCall | None = None


def squeezed(features: Tensor) -> Squeezed | None:
    """Return features and their mean; ``None`` where the plain formulation is better."""
    if type(features) is not Tensor or not features.requires_grad or _is_small(features):
        return None
    mean, of_output, of_map = _Squeeze.apply(features)
    return Squeezed(features, mean, of_output, of_map)


def normalized(site: nn.Module, x: Any) -> Squeezed | None:
    """Return a batch norm's output for ``x``, and its mean; ``None``, without running it, for any other layer.

    Args:
        site: the layer, which is unobserved.
        x: its input.
    """
    if not can_run(site, x) or _is_small(x):
        return None
    features, norm = run(site, x)
    mean, of_output, of_map = _Squeeze.apply(features)
    return Squeezed(features, mean, of_output, of_map, norm)


def _is_small(features: Tensor) -> bool:
    return features.numel() < (SMALL_ON_CPU if features.is_cpu else SMALL)


def recalibrated(squeezed: Squeezed, attention_map: Tensor) -> Tensor:
    """Return features ``[B, C, ...]`` times a map that broadcasts against them; changes a norm's output in place."""
    features, mean, of_output, of_map, norm = squeezed
    if attention_map.shape != beside(mean, features).shape or attention_map.dtype != features.dtype:
        return features * attention_map
    product: Tensor = _Recalibrate.apply(features, attention_map, of_output, of_map, *(norm or ()))
    return product


class _Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape = features.shape
        mean = mean_over_positions(features)
        return mean, features.new_empty(()).expand(features.shape), torch.empty_like(mean)

    @staticmethod
    def backward(
        ctx: Any, of_mean: Tensor | None, of_output: Tensor | None, attention_map: Tensor | None
    ) -> Tensor | None:
        shape, share = ctx.shape, None
        if of_mean is not None:
            share = (of_mean / math.prod(shape[2:])).reshape(*shape[:2], *[1] * (len(shape) - 2))
        if of_output is None or attention_map is None:
            return share if share is None else share.expand(shape)
        attention_map = beside(attention_map, of_output)
        return of_output * attention_map if share is None else torch.addcmul(share, of_output, attention_map)


class _Recalibrate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        attention_map: Tensor,
        of_output: Tensor,
        of_map: Tensor,
        *norm: Any,
    ) -> Tensor:
        ctx.settings = norm[TENSORS:]
        ctx.save_for_backward(attention_map, *(norm[:TENSORS] or (features,)))
        if not norm or is_recorded():
            return features * attention_map
        ctx.mark_dirty(features)
        return features.mul_(attention_map)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        attention_map, *kept = ctx.saved_tensors
        if ctx.settings:
            of_map = _of_map_after_norm(of_output, NormCall(*kept, *ctx.settings))
        else:
            of_map = _of_map(of_output, kept[0])
        nothing = [None] * (len(ctx.needs_input_grad) - 4)
        return None, beside(of_map, of_output).to(attention_map.dtype), of_output, attention_map.flatten(1), *nothing


def _of_map(gradient: Tensor, features: Tensor) -> Tensor:
    """Return the sum over positions ``[B, C]`` of the product of a gradient and features."""
    if not _are_rows(gradient, features):
        return (gradient * features).flatten(2).sum(2)
    zeros = features.new_zeros(features.shape[:2].numel())
    return moments(gradient, features, zeros, zeros + 1)[1]


def _of_map_after_norm(gradient: Tensor, norm: NormCall) -> Tensor:
    """Return the sum over positions ``[B, C]`` of the product of a gradient and a norm's output."""
    if not _are_rows(gradient, norm.x):
        return (gradient * norm.output()).flatten(2).sum(2)
    samples = len(norm.x)
    total, moment = moments(gradient, norm.x, norm.shift.repeat(samples), norm.factor.repeat(samples))
    return torch.addcmul(norm.bias * total, norm.weight, moment)


def _are_rows(gradient: Tensor, features: Tensor) -> bool:
    """Return whether the fast kernel takes two tensors: they must be contiguous, and it is not differentiable."""
    in_order = gradient.is_contiguous() and features.is_contiguous()
    return in_order and not torch.is_grad_enabled() and is_eager() and features.device.type in ("cpu", "cuda")
