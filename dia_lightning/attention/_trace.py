"""Run a copy of a network once and record which operation made which tensor, inside of which module.

The copy runs on meta tensors, which have shapes but no contents and take no memory, if it can; a network whose forward
looks at numbers runs on a copy of its weights instead. Either way the network itself is not called.
"""

import copy
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from dia_lightning.attention._axes import axis_after
from dia_lightning.attention._links import parameters_of, tensors_in

_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class Value:
    """A tensor as an operation has left it; one that is written in place is another value after that.

    Args:
        number: values that are made later have higher ones.
        made_by: name of the operation; of what goes into the network, and of weights, the empty text.
        parents: what the operation was given.
        live: whether it depends on what goes into the network, and not on weights alone.
        shape: of the tensor.
        channel_axis: axis of the channels, from 0 on; ``None`` if it is lost.
        call: the call of a module that ran the operation.
        is_causal: whether the operation is attention to earlier tokens only.
    """

    number: int
    made_by: str
    parents: "tuple[Value, ...]"
    live: bool
    shape: tuple[int, ...]
    channel_axis: int | None
    call: "Call | None"
    is_causal: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(eq=False)
class Call:
    """A call of a module.

    Args:
        path: of the module in the network.
        module: the module, of the copy.
        outer: the call that it runs in.
        given: the values in each argument, by the argument's name.
        is_first: whether the module was not called before, as it is at each later step of a recurrent network.
        is_simple: whether it takes one tensor, by position, and puts out one.
        returned: what it puts out first; ``None`` if that is no tensor.
        inner: calls that ran in this one, in order.
    """

    path: str
    module: nn.Module
    outer: "Call | None"
    given: dict[str, list[Value]]
    is_first: bool
    is_simple: bool = True
    returned: Value | None = None
    inner: "list[Call]" = field(default_factory=list)

    def inputs(self) -> set[Value]:
        """Return all values that the call was given."""
        return {value for values in self.given.values() for value in values}

    def is_in(self, path: str) -> bool:
        """Tell whether this ran in a call of a module."""
        outer = self.outer
        while outer is not None and outer.path != path:
            outer = outer.outer
        return outer is not None

    def within(self) -> "Iterator[Call]":
        """Yield all calls inside this one, in the order in which they end."""
        for call in self.inner:
            yield from call.within()
            yield call


@dataclass(eq=False)
class Addition:
    """An addition of two tensors of one shape.

    Args:
        call: of the module whose code adds.
        operands: what is added.
        result: the sum.
    """

    call: Call
    operands: tuple[Value, Value]
    result: Value


@dataclass
class Run:
    """A forward of a network.

    Args:
        samples: their number.
        calls: of modules, in the order in which they end.
        additions: in the order in which they ran.
        queries: shapes of what torch's attention was given, tokens first.
    """

    samples: int
    calls: list[Call] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    queries: list[torch.Size] = field(default_factory=list)

    def is_only_in(self, path: str, block: str) -> bool:
        """Tell whether a module was called in calls of a block only."""
        return all(call.is_in(block) for call in self.calls if call.path == path)


def trace(model: nn.Module, example: Any, *, only_on_meta: bool = False) -> tuple[Run, Run]:
    """Run a copy of a network on an example, and on twice as many samples.

    Args:
        model: the network. Its weights, buffers and mode, and the state of random generators, stay as they are.
        example: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        only_on_meta: whether to give up on a network that does not run on meta tensors.

    Raises:
        ValueError: if the network does not run on the example.
    """
    given = arguments_of(example)
    runs = _runs(model, given, 0, only_on_meta)
    return _runs(model, given, 1, only_on_meta) if _attends_over_samples(*runs) else runs


def _runs(model: nn.Module, given: _Arguments, axis: int, only_on_meta: bool) -> tuple[Run, Run]:
    """Return runs on an example and on one of twice as many samples, which lie along an axis."""
    samples = _samples(*given, axis)
    with torch.no_grad():
        try:
            with _without_caches(model), torch.device("meta"):
                subject = _copy(model, partial(_on, "meta"))
                first, second = (_record(subject, model, given, "meta", samples, axis, times) for times in (1, 2))
                return first, second
        except Exception as error:  # it looks at numbers, or makes tensors elsewhere
            if only_on_meta:
                raise ValueError(_does_not_run(model, error)) from error
        device = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
        try:
            subject = _copy(model, partial(_on, device))
            first = _record(subject, model, given, device, samples, axis, 1)
        except Exception as error:
            raise ValueError(_does_not_run(model, error)) from error
        try:
            return first, _record(subject, model, given, device, samples, axis, 2)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} runs on the example, but not on {2 * samples} samples, which would show what "
                f"the axis of the samples is: {type(error).__name__}: {error} Every tensor of the example that has "
                f"{samples} entries on axis {axis} is taken to hold one per sample."
            ) from error


def _attends_over_samples(once: Run, twice: Run) -> bool:
    """Tell whether torch's attention has more tokens where there are more samples, so that tokens come first."""
    return any(one[0] != two[0] for one, two in zip(once.queries, twice.queries, strict=False))


def _does_not_run(model: nn.Module, error: Exception) -> str:
    return (
        f"{type(model).__name__} does not run on the example: {type(error).__name__}: {error} An example is a tensor, "
        "a tuple of positional arguments or a dict of keyword arguments of its forward."
    )


def arguments_of(example: Any) -> _Arguments:
    """Return the positional and the keyword arguments that an example stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return example if isinstance(example, tuple) else (example,), {}


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> int:
    for value in (*args, *kwargs.values()):
        tensors = tensors_in(value)
        sizes = [tensor.shape[axis] for tensor in tensors if tensor.ndim > axis]
        samples = len(value) if isinstance(value, list) and tensors else next(iter(sizes), None)  # or images by size
        if samples == 0:
            raise ValueError("example has no samples. Give at least one.")
        if samples is not None:
            return samples
    raise ValueError("example has no tensor whose first axis is the samples. Give what the network's forward takes.")


def _example(arguments: _Arguments, device: Any, samples: int, axis: int, times: int) -> _Arguments:
    """Return a copy of the arguments on a device, with several times as many samples."""

    def several(tensor: Tensor) -> Tensor:
        tensor = _on(device, tensor)
        is_batch = tensor.ndim > axis and tensor.shape[axis] == samples
        return torch.cat([tensor] * times, axis) if is_batch and times > 1 else tensor

    def changed(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            value = copy.copy(value)
            for name, part in vars(value).items():
                object.__setattr__(value, name, changed(part))
            return value
        if isinstance(value, list) and tensors_in(value) and len(value) == samples:
            return [tree_map_only(Tensor, partial(_on, device), each) for each in value * times]
        return tree_map_only(Tensor, several, value)

    args, kwargs = arguments
    return tuple(map(changed, args)), {name: changed(value) for name, value in kwargs.items()}


def _on(device: Any, tensor: Tensor) -> Tensor:
    """Return a copy on a device; of a meta tensor, zeros."""
    if tensor.is_meta and str(device) != "meta":
        return torch.zeros_like(tensor, device=device)
    return tensor.detach().to(device, copy=True)


@contextmanager
def _random_state() -> Iterator[None]:
    state, state_of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(state_of_numpy)


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Empty the function caches of the code of a network afterwards, in which meta tensors may be left."""
    try:
        yield
    finally:
        for kind in {base for module in model.modules() for base in type(module).__mro__ if base is not object}:
            code = sys.modules.get(kind.__module__)
            if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
                for function in [*vars(code).values(), *vars(kind).values()] if code is not None else ():
                    if hasattr(function, "cache_clear") and callable(function.cache_clear):
                        function.cache_clear()


def _copy(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy in evaluation mode whose tensors are changed ones."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tree_leaves(list(vars(module).values())):  # parameters, buffers and others
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                changed = change(tensor)
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(changed, tensor.requires_grad) if is_parameter else changed
                memo[id(tensor)]._dia_is_triangular = not is_parameter and _is_triangular(tensor)
        memo.update((id(hook), hook) for hook in _hooks_of_users(module).values())
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        for key in _hooks_of_users(module):  # which would see the copy's tensors
            module._forward_pre_hooks.pop(key, None)
            module._forward_hooks.pop(key, None)
    return copied


def _hooks_of_users(module: nn.Module) -> dict[int, Any]:
    """Return the hooks on a module's forward that are not torch's, which compute weights."""
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    return {key: hook for key, hook in hooks.items() if not getattr(hook, "__module__", "").startswith("torch.")}


def _is_triangular(tensor: Tensor) -> bool:
    """Tell whether a tensor is a mask that hides later tokens: one value up to the diagonal, and another above."""
    if tensor.is_meta or tensor.ndim < 2 or tensor.shape[-1] < 2 or tensor.shape[-1] != tensor.shape[-2]:
        return False
    one = tensor.reshape(-1, *tensor.shape[-2:])[0]
    upper = torch.ones_like(one, dtype=torch.bool).triu(1)
    kept, hidden = one[~upper], one[upper]
    return bool((kept == kept[0]).all() and (hidden == hidden[0]).all() and kept[0] != hidden[0])


def _record(
    model: nn.Module, original: nn.Module, given: _Arguments, device: Any, samples: int, axis: int, times: int
) -> Run:
    args, kwargs = _example(given, device, samples, axis, times)
    recorder = _Recorder(
        model, Run(times * samples), {id(tensor) for tensor in (*original.parameters(), *original.buffers())}
    )
    for tensor in tensors_in((args, kwargs)):
        recorder.value_of(tensor).live = True
    with _random_state(), recorder:  # both runs draw the same numbers
        model(*args, **kwargs)
    return recorder.run


_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"}  # of a residual
#: Operations that are told to be causal, and at which position.
_CAUSAL = {"scaled_dot_product_attention": 5, "multi_head_attention_forward": 24}


#: What is made does not depend on what is given but for its shape.
_CONSTANTS = {f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")}
_CONSTANTS |= {f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor")}


class _Recorder(TorchFunctionMode):
    """Notes the value on each tensor. Calls are seen by hooks, which a copy may be given."""

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

    def __enter__(self) -> "_Recorder":
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
            self.call.returned = self.value_of(output)
        self.run.calls.append(self.call)
        self.call = self.call.outer

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name in _CONSTANTS:
            return function(*args, **kwargs)
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        parents = tuple(map(self.value_of, given))
        name = getattr(function, "__name__", str(function))
        if name == "lstm" and given[0].is_meta and isinstance(args[1], tuple):  # of a sequence that is not packed
            function = _lstm_on_meta
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
        if name in _CAUSAL and (kwargs.get("is_causal") or True in args[_CAUSAL[name] :][:1]):
            self.value_of(tree_leaves(output)[0]).is_causal = True
        if name in _ADDITIONS and len(parents) == 2 and self.call is not None and self.call.is_first:
            left, right = parents
            if left.shape == right.shape and len(left.shape) >= 3 and left.live and right.live:
                self.run.additions.append(Addition(self.call, (left, right), self.value_of(output)))
        return output

    def value_of(self, tensor: Tensor) -> Value:
        """Return the value that is noted on a tensor; a new one without parents if there is none."""
        if id(tensor) in self.original:
            raise RuntimeError("the forward runs the network itself, and not its copy, as where a method was replaced")
        noted: tuple[_Recorder, Value, int] | None = getattr(tensor, "_dia_value", None)
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
    """Return what an LSTM does without its steps, which take seconds on meta tensors."""
    *_, is_bidirectional, _ = options
    width = states[0].shape[-1] * (1 + is_bidirectional)
    return sequence.new_empty(*sequence.shape[:-1], width), *map(torch.empty_like, states)


def _swapped(one: Tensor, other: Tensor, value: Any) -> Any:
    return other if value is one else value


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
