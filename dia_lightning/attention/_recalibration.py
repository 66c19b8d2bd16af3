"""Squeeze and recalibration of a branch, in as few passes over its features as autograd allows.

For a unit to which positions count by their mean only, the plain formulation is ``y * unit(y.mean())``. Its backward
pass makes five tensors of the size of ``y``, and ``y`` is kept for it. Two autograd functions, between which the unit
runs, make one: :class:`_Recalibrate` gives the gradient of the map, and :class:`_Squeeze` that of ``y``, once that of
the mean is known. What it needs for this comes as the "gradient" of placeholders, so that autograd keeps the order, in
whichever way the graph is run.

Where ``y`` is put out by a batch norm, which keeps its own input anyway, ``y`` is multiplied in place and not kept: the
gradient of the map is computed from that input.

Outputs are those of the plain formulation bit for bit, which stays where compilers fuse it, where others follow what
runs (``torch.func``, forward-mode differentiation), and for small features, where calls cost more than passes.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dia_lightning.attention._roles import plain_class
from dia_lightning.attention._unit import beside, mean_over_positions

#: From how many entries of the features on the functions are faster than the plain formulation, measured on a CPU.
SMALL = 2**18

#: Batch norms that can be computed again from their input, with the number of axes that they take.
_NORMS: dict[type[nn.Module], int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
#: Layers that put out a new tensor.
_FRESH = {*_NORMS, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.LayerNorm, nn.GroupNorm}


class NormCall(NamedTuple):
    """What a batch norm was called with.

    Args:
        x: its input ``[B, C, ...]``.
        weight: of the norm ``[C]``.
        bias: of the norm ``[C]``.
        mean: what was subtracted ``[C]``.
        factor: what was multiplied with then, the inverse of the deviation ``[C]``.
        eps: of the norm.
        of_batch: whether mean and deviation are those of the batch.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    factor: Tensor
    eps: float
    of_batch: bool

    def output(self) -> Tensor:
        """Compute what the norm put out again, so that autograd can follow."""
        if self.of_batch and torch.is_grad_enabled():
            return torch.batch_norm(self.x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)
        variance = self.factor.pow(-2) - self.eps
        return torch.batch_norm(self.x, self.weight, self.bias, self.mean, variance, False, 0.0, self.eps, False)


def is_eager() -> bool:
    """Tell whether nothing but autograd follows what runs."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def is_unseen(site: nn.Module) -> bool:
    """Tell whether a site puts out a new tensor that nobody but its caller has, so that it may be changed."""
    return (
        plain_class(site) in _FRESH
        and not (site._forward_hooks or site._forward_pre_hooks or site._backward_hooks or site._backward_pre_hooks)
        and not nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        and "forward" not in vars(site)
    )


def normalized(site: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, NormCall] | None:
    """Run a batch norm, and return what it puts out and how to compute that again; ``None`` for any other layer.

    Args:
        site: the layer, which :func:`is_unseen`.
        args: of the call.
    """
    x = args[0] if len(args) == 1 else None
    if type(x) is not Tensor or x.ndim != _NORMS.get(plain_class(site)):
        return None
    norm: Any = site
    if norm.weight is None or norm.momentum is None or x.numel() < max(SMALL, 2 * x.shape[1]):
        return None
    of_batch = norm.training or norm.running_mean is None
    running = (norm.running_mean, norm.running_var) if norm.track_running_stats or not norm.training else (None, None)
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    # what nn.BatchNorm2d calls in the end, and the only function that also returns mean and deviation, on any device
    y, mean, factor, *_ = torch.ops.aten._batch_norm_impl_index(
        x, norm.weight, norm.bias, *running, of_batch, norm.momentum, norm.eps, torch.backends.cudnn.enabled
    )
    if not of_batch:
        mean, factor = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    return y, NormCall(x, norm.weight, norm.bias, mean, factor, norm.eps, of_batch)


def is_worth_it(features: Tensor) -> bool:
    """Tell whether features are large enough, and of the kind, for :func:`squeezed` and :func:`recalibrated`."""
    return type(features) is Tensor and features.requires_grad and features.numel() >= SMALL


class Squeezed(NamedTuple):
    """The mean of features.

    Args:
        mean: over positions ``[B, C]``.
        of_output: placeholder for the gradient of the product, of its shape.
        of_map: placeholder for the map ``[B, C]``.
    """

    mean: Tensor
    of_output: Tensor
    of_map: Tensor


def squeezed(features: Tensor) -> Squeezed:
    """Return the mean of features ``[B, C, ...]``."""
    return Squeezed(*_Squeeze.apply(features))


def recalibrated(features: Tensor, attention_map: Tensor, squeezed: Squeezed, norm: NormCall | None) -> Tensor:
    """Return features ``[B, C, ...]`` multiplied by their map.

    Args:
        features: what the mean was taken of; what a norm put out is changed.
        attention_map: what broadcasts against them.
        squeezed: what :func:`squeezed` returned for the features.
        norm: the batch norm that put out the features, if it was one.
    """
    if attention_map.shape != beside(squeezed.mean, features).shape or attention_map.dtype != features.dtype:
        return features * attention_map
    product: Tensor = _Recalibrate.apply(features, attention_map, squeezed.of_output, squeezed.of_map, *(norm or ()))
    return product


class _Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.of = features.shape, math.prod(features.shape[2:])
        mean = mean_over_positions(features)
        return mean, features.new_empty(()).expand(features.shape), torch.empty_like(mean)

    @staticmethod
    def backward(
        ctx: Any, of_mean: Tensor | None, of_output: Tensor | None, attention_map: Tensor | None
    ) -> Tensor | None:
        shape, positions = ctx.of
        share = None if of_mean is None else (of_mean / positions).reshape(*of_mean.shape, *[1] * (len(shape) - 2))
        if of_output is None or attention_map is None:
            return share if share is None else share.expand(shape)
        attention_map = beside(attention_map, of_output)
        return of_output * attention_map if share is None else torch.addcmul(share, of_output, attention_map)


class _Recalibrate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, attention_map: Tensor, of_output: Tensor, of_map: Tensor, *norm: Any
    ) -> Tensor:
        ctx.norm_settings = norm[5:]
        ctx.save_for_backward(attention_map, *(norm[:5] or (features,)))
        if not norm:
            return features * attention_map
        ctx.mark_dirty(features)
        return features.mul_(attention_map)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        attention_map, *kept = ctx.saved_tensors
        if ctx.norm_settings:
            of_map = _dot_with_norm(of_output, NormCall(*kept, *ctx.norm_settings))
        else:
            of_map = _dot(of_output, kept[0])
        nothing = [None] * (len(ctx.needs_input_grad) - 4)
        return None, beside(of_map, of_output).to(attention_map.dtype), of_output, attention_map.flatten(1), *nothing


def _dot(gradient: Tensor, features: Tensor) -> Tensor:
    """Return the sum over positions ``[B, C]`` of the product of two tensors ``[B, C, ...]``."""
    if not _is_dense(gradient, features):
        return (gradient * features).flatten(2).sum(2)
    zeros = features.new_zeros(features.shape[:2].numel(), dtype=torch.promote_types(features.dtype, torch.float32))
    return _moments(gradient, features, zeros, zeros + 1)[0]


def _dot_with_norm(gradient: Tensor, norm: NormCall) -> Tensor:
    """Return the sum over positions ``[B, C]`` of the product of a tensor and what a norm put out."""
    if not _is_dense(gradient, norm.x):
        return (gradient * norm.output()).flatten(2).sum(2)
    samples = len(norm.x)
    moment, total = _moments(gradient, norm.x, norm.mean.repeat(samples), norm.factor.repeat(samples))
    return torch.addcmul(norm.bias * total, norm.weight, moment)


def _is_dense(gradient: Tensor, features: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and gradient.is_contiguous()
        and features.is_contiguous()
        and features.device.type in ("cpu", "cuda")
    )


def _moments(gradient: Tensor, features: Tensor, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum(gradient * (features - mean) * factor)`` and ``sum(gradient)`` over positions, each ``[B, C]``.

    That is what the backward pass of a batch norm computes for its weights, here with a norm for each sample: one pass,
    where a product and a sum make three. ``mean`` and ``factor`` ``[B * C]`` must be contiguous, as the kernel reads
    them so.
    """
    shape = features.shape[:2]
    rows = 1, shape.numel(), -1
    of_weight: Tensor
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        gradient.view(rows), features.view(rows), factor, None, None, mean, factor, True, 0.0, [False, True, True]
    )
    return of_weight.view(shape), of_bias.view(shape)
