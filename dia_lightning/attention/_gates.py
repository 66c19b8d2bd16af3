"""The gates of a recurrent unit, and the gradients of their weights from all blocks at once.

Autograd computes the gradient of a weight once per block and adds them up: for T blocks T products of the size of the
weight, and T - 1 sums. Here every block notes in backward the factors of its product, and when the last of them has,
one product is made of all. The notes belong to a node of the autograd graph that all blocks depend on, so they live as
long as the graph, and weights get their gradients during the backward pass, where wrappers such as DDP and FSDP expect
them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.attention._eager import is_eager, is_unseen
from dia_lightning.attention._running import Rider, backward_task


def gates_of(value: Tensor, hidden: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the sum of two bottleneck MLPs ``[B, gates * C]``, of a value and a hidden state, each ``[B, C]``.

    Args:
        value: input of the first.
        hidden: input of the second.
        parameters: weight and bias of the layers that reduce and expand the value, and of those for the hidden state.
    """
    first, second = parameters[:4], parameters[4:]
    return F.linear(_reduced(value, *first[:2]), *first[2:]) + F.linear(_reduced(hidden, *second[:2]), *second[2:])


class GatesOfChain(Rider):
    """Computes the gates of all blocks of a chain in one autograd graph."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._parameters = _parameters(layers)
        self._stream = _stream(self._parameters[0])
        self._notes = _Notes()
        self._anchor: Tensor = _Gather.apply(self._notes, *self._parameters)

    def __call__(self, value: Tensor, hidden: Tensor) -> Tensor:
        """Return what :func:`gates_of` does."""
        gates: Tensor = _Gates.apply(value, hidden, self._anchor, self._notes, *self._parameters)
        return gates

    def fits(self, layers: Sequence[nn.Linear], state: Tensor) -> bool:
        """Return whether layers have the weights of the blocks before, since a state may go to another unit.

        And whether they run on the same stream: autograd waits for another one only where a gradient comes from there.
        """
        same = all(own is other for own, other in zip(self._parameters, _parameters(layers), strict=True))
        return same and self._stream == _stream(state)


def gates_of_chain(layers: Sequence[nn.Linear], state: Tensor | None) -> GatesOfChain | None:
    """Return what computes the gates; ``None`` where the layers must be called one by one.

    Args:
        layers: of a unit, in the order of :func:`gates_of`.
        state: what :func:`hand_on` received in the block before; ``None`` in the first block.
    """
    if not (torch.is_grad_enabled() and is_eager() and all(_is_plain(layer) for layer in layers)):
        return None
    if state is None:
        return GatesOfChain(layers)
    made_there: Any = getattr(state, "_dia_gates", None)  # not on a copy of the state
    return made_there if isinstance(made_there, GatesOfChain) and made_there.fits(layers, state) else None


def hand_on(gates: GatesOfChain | None, state: Tensor) -> None:
    """Let the next block find what computes the gates, along with its state."""
    if gates is not None:
        state._dia_gates = gates  # type: ignore[attr-defined]


def _is_plain(layer: nn.Linear) -> bool:
    """Return whether a layer is linear and unobserved, and its weights are its own rather than views of a wrapper."""
    return (
        isinstance(layer, nn.Linear)
        and is_unseen(layer)
        and all(type(each) is nn.Parameter and each.requires_grad for each in (layer.weight, layer.bias))
    )


def _stream(tensor: Tensor) -> Any:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _parameters(layers: Sequence[nn.Linear]) -> list[Tensor]:
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


def _reduced(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(F.linear(x, weight, bias))


class _Notes:
    """What the blocks of a chain note in backward."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, tuple[Tensor, ...]]] = []

    def add(self, *tensors: Tensor) -> None:
        # without their graph, which would hold the notes; others are left alone, as batched ones have no detach()
        kept = tuple(tensor.detach() if tensor.requires_grad else tensor for tensor in tensors)
        self._blocks.append((backward_task(), kept))

    def taken(self) -> list[Tensor]:
        """Return and forget the notes of this backward pass, concatenated over the blocks; empty if there are none."""
        task = backward_task()
        noted = [tensors for of, tensors in self._blocks if of == task]
        self._blocks = [block for block in self._blocks if block[0] != task]
        return [torch.cat(tensors) for tensors in zip(*noted, strict=True)]


class _Gather(torch.autograd.Function):
    """Graph node between the parameters and every block."""

    @staticmethod
    def forward(ctx: Any, notes: _Notes, *parameters: Tensor) -> Tensor:
        ctx.notes = notes
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.set_materialize_grads(False)
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        noted = ctx.notes.taken()
        if not noted:
            return None, *[None] * len(ctx.dtypes)
        value, of_value, hidden, of_hidden, inner, inner_hidden, of_gates = noted
        of_bias = of_gates.sum(0)
        gradients = (
            *(of_value.t() @ value, of_value.sum(0), of_gates.t() @ inner, of_bias),
            # each in its own memory, since callers may scale it in place
            *(of_hidden.t() @ hidden, of_hidden.sum(0), of_gates.t() @ inner_hidden, of_bias.clone()),
        )
        return None, *[gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, hidden: Tensor, anchor: Tensor, notes: _Notes, *parameters: Tensor) -> Tensor:
        inner, inner_hidden = _reduced(value, *parameters[:2]), _reduced(hidden, *parameters[4:6])
        ctx.notes, ctx.gather = notes, anchor.grad_fn
        ctx.save_for_backward(value, hidden, inner, inner_hidden, *parameters)
        return F.linear(inner, *parameters[2:4]) + F.linear(inner_hidden, *parameters[6:])

    @staticmethod
    def backward(ctx: Any, of_gates: Tensor) -> tuple[Tensor | None, ...]:
        value, hidden, inner, inner_hidden, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            wanted = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:])
            of_value, of_hidden, *of_parameters = _by_autograd(of_gates, wanted, (value, hidden, *parameters))
            return of_value, of_hidden, None, None, *of_parameters
        dtype = of_gates.dtype  # lower than that of the weights under autocast
        of_inner = [
            torch.ops.aten.threshold_backward(of_gates @ weight.to(dtype), activated, 0)
            for weight, activated in ((parameters[2], inner), (parameters[6], inner_hidden))
        ]
        of_value, of_hidden = (
            (gradient @ weight.to(dtype)).to(x.dtype) if is_wanted else None
            for gradient, weight, x, is_wanted in zip(
                of_inner, (parameters[0], parameters[4]), (value, hidden), ctx.needs_input_grad[:2], strict=True
            )
        )
        if torch._C._will_engine_execute_node(ctx.gather):
            ctx.notes.add(value.to(dtype), of_inner[0], hidden.to(dtype), of_inner[1], inner, inner_hidden, of_gates)
        return of_value, of_hidden, None, None, *[None] * len(parameters)


def _by_autograd(of_gates: Tensor, wanted: Sequence[bool], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the wanted gradients of value, hidden state and parameters, to be differentiated again."""
    # views, because the hidden state also depends on the parameters, through the blocks before
    value, hidden, *parameters = views = [x.view_as(x) for x in inputs]
    with torch.autocast(of_gates.device.type, of_gates.dtype, enabled=of_gates.dtype != parameters[0].dtype):
        gates = gates_of(value, hidden, parameters)
    # weights may have been frozen since
    asked = [x if is_wanted and x.requires_grad else None for x, is_wanted in zip(views, wanted, strict=True)]
    found = iter(torch.autograd.grad(gates, [x for x in asked if x is not None], of_gates, create_graph=True))
    return [None if x is None else next(found) for x in asked]
