"""Record which operation makes which tensor, inside which module."""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from dia_lightning.attention._axes import axis_after
from dia_lightning.attention._graph import Addition, Call, Run, Value
from dia_lightning.attention._links import parameters_of, tensors_in
from dia_lightning.attention._operations import CAUSAL, CONSTANTS, DIFFERENCES, SUMS

_ADDITIONS = SUMS | DIFFERENCES


class Recorder(TorchFunctionMode):
    """Notes the value on each tensor. It sees calls through hooks, so it needs a copy."""

    def __init__(self, model: nn.Module, run: Run, original: set[int]) -> None:
        super().__init__()
        self.run = run
        self.original = original  # ids of the tensors of the network, which must not take part
        self.marked: list[weakref.ref[Tensor]] = []
        self.count = 0
        self.seen: set[str] = set()  # paths of modules that were called
        self.call: Call | None = None
        self.handles: list[Any] = []
        self.paths = {module: path for path, module in model.named_modules()}

    def __enter__(self) -> "Recorder":
        for module in self.paths:
            self.handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.leave, with_kwargs=True, prepend=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.paths.clear()
        for mark in self.marked:
            tensor = mark()
            if tensor is not None:
                vars(tensor).pop("_dia_value", None)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = parameters_of(module)
        named = {**dict(zip(names, args, strict=False)), **kwargs, "": args[len(names) :]}
        with torch._C.DisableTorchFunction():
            given = {name: [self.value_of(tensor) for tensor in tensors_in(value)] for name, value in named.items()}
        call = Call(self.paths[module], module, self.call, given, is_first=self.paths[module] not in self.seen)
        call.is_simple = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        self.seen.add(call.path)
        if self.call is not None:
            self.call.inner.append(call)
        self.call = call

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert self.call is not None
        self.call.is_simple &= isinstance(output, Tensor)
        while isinstance(output, tuple) and output:
            output = output[0]  # as sites read what attention layers return
        if isinstance(output, Tensor):
            with torch._C.DisableTorchFunction():
                self.call.returned = self.value_of(output)
        self.run.calls.append(self.call)
        self.call = self.call.outer

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name in CONSTANTS:
            return function(*args, **kwargs)
        if types or not (args and isinstance(args[0], Tensor)):
            return self.note_call(function, name, args, kwargs)
        with torch._C.DisableTorchFunction():  # else all its tensor queries also go through the default device
            return self.note_call(function, name, args, kwargs)

    def note_call(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        parents = tuple(map(self.value_of, given))
        if name == "lstm" and given[0].is_meta and isinstance(args[1], tuple):  # of a sequence that is not packed
            function = _lstm_on_meta
        elif given and given[0].is_meta and _is_norm_that_fits(name, args):
            function = _norm_on_meta
        output = function(*args, **kwargs)
        if name.startswith("addcmul") and len(given) == 3:
            name, parents = "add", (parents[0], self.new(output, "mul", parents[1:], parents[1].channel_axis))

        def again(tensor: Tensor) -> Any:
            swap = partial(_swapped, given[0], tensor)
            return function(*tree_map(swap, args), **tree_map(swap, kwargs))

        index = args[1] if len(args) > 1 else None
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and not any(tensor is other for other in given):
                axis = axis_after(name, parents, tuple(tensor.shape), index, again)
                self.note(tensor, name, parents, axis)
        for tensor, parent in zip(given, parents, strict=False):
            if _version(tensor) != tensor._dia_value[2]:  # type: ignore[attr-defined]  # written in place
                self.note(tensor, name, parents, parent.channel_axis)
        if name == "multi_head_attention_forward" and given[0].ndim == 3:
            self.run.queries.append(given[0].shape)
        if name in CAUSAL and (kwargs.get("is_causal") or True in args[CAUSAL[name] :][:1]):
            self.value_of(tree_leaves(output)[0]).is_causal = True
        if name in _ADDITIONS and len(parents) == 2 and self.call is not None and self.call.is_first:
            left, right = parents
            if left.shape == right.shape and len(left.shape) >= 3 and left.live and right.live:
                self.run.additions.append(Addition(self.call, (left, right), self.value_of(output)))
        return output

    def value_of(self, tensor: Tensor) -> Value:
        """Return the value noted on a tensor; a new one without parents if there is none."""
        if id(tensor) in self.original:
            raise RuntimeError("the forward runs the network itself instead of its copy, as when a method was replaced")
        noted: tuple[Recorder, Value, int] | None = getattr(tensor, "_dia_value", None)
        if noted is None or noted[0] is not self:
            return self.note(tensor, "tril" if getattr(tensor, "_dia_is_triangular", False) else "", (), None)
        _, value, version = noted
        if version != _version(tensor):  # written through a view of it
            return self.note(tensor, "write", (value,), value.channel_axis)
        return value

    def note(self, tensor: Tensor, name: str, parents: tuple[Value, ...], axis: int | None) -> Value:
        value = self.new(tensor, name, parents, axis)
        tensor._dia_value = self, value, _version(tensor)  # type: ignore[attr-defined]
        self.marked.append(weakref.ref(tensor))
        return value

    def new(self, tensor: Tensor, name: str, parents: tuple[Value, ...], axis: int | None) -> Value:
        self.count += 1
        live = any(parent.live for parent in parents)
        return Value(self.count, name, parents, live, tuple(tensor.shape), axis, self.call)


def _lstm_on_meta(sequence: Tensor, states: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    """Return the output of an LSTM without running its steps, which take seconds on meta tensors."""
    *_, is_bidirectional, _ = options
    width = states[0].shape[-1] * (1 + is_bidirectional)
    return sequence.new_empty(*sequence.shape[:-1], width), *map(torch.empty_like, states)


def _is_norm_that_fits(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether the call normalises features of the norm's width; torch raises its own errors for others."""
    if name == "layer_norm":
        return len(args) > 1 and tuple(args[0].shape[-len(args[1]) :]) == tuple(args[1])
    if name == "batch_norm":
        return len(args) > 1 and isinstance(args[1], Tensor) and args[0].shape[1:2] == args[1].shape
    return False


def _norm_on_meta(features: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the output of a norm without its many small steps, which take half the time of a run on meta tensors."""
    return torch.empty_like(features)


def _swapped(one: Tensor, other: Tensor, value: Any) -> Any:
    return other if value is one else value


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
