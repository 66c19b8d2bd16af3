"""Run a copy of a network once and record which operation made which tensor, inside which module.

If possible, the copy runs on meta tensors, which have shapes but no contents and take no memory; a network whose
forward reads values runs on a copy of its weights instead. Either way the network itself is not called.
"""

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dia_lightning.attention._graph import Run
from dia_lightning.attention._links import tensors_in
from dia_lightning.attention._recorder import Recorder

_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def trace(model: nn.Module, example: Any, *, only_on_meta: bool = False) -> tuple[Run, Run]:
    """Run a copy of a network on an example, and on twice as many samples.

    Args:
        model: the network. Its weights, buffers and mode, and the state of random generators, do not change.
        example: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        only_on_meta: whether to give up on a network that does not run on meta tensors.

    Raises:
        ValueError: if the network does not run on the example.
    """
    given = arguments_of(example)
    runs = _runs(model, given, 0, only_on_meta)
    return _runs(model, given, 1, only_on_meta) if _attends_over_samples(*runs) else runs


def _runs(model: nn.Module, given: _Arguments, axis: int, only_on_meta: bool) -> tuple[Run, Run]:
    """Return runs on an example and on one with twice as many samples along an axis."""
    samples = _samples(*given, axis)
    with torch.no_grad():
        try:
            with _without_caches(model), torch.device("meta"):
                subject = _copy(model, partial(_on, "meta"))
                first, second = (_record(subject, model, given, "meta", samples, axis, times) for times in (1, 2))
                return first, second
        except Exception as error:  # it reads values, or makes tensors elsewhere
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
                f"{type(model).__name__} runs on the example, but not on {2 * samples} samples, which would show which "
                f"axis the samples are on: {_said(error)}. Every tensor of the example with {samples} entries "
                f"on axis {axis} is assumed to hold one per sample."
            ) from error


def _attends_over_samples(once: Run, twice: Run) -> bool:
    """Return whether torch's attention sees more tokens given more samples, because tokens come first."""
    return any(one[0] != two[0] for one, two in zip(once.queries, twice.queries, strict=False))


def _does_not_run(model: nn.Module, error: Exception) -> str:
    return (
        f"{type(model).__name__} does not run on the example: {_said(error)}. An example is a tensor, a tuple (not a "
        "list) of positional arguments or a dict of keyword arguments of its forward, with an axis for the samples."
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).rstrip('.')}"


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
    numpy = sys.modules.get("numpy")  # a network may use it; this package need not import it
    state, state_of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(state_of_numpy)


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Afterwards clear the function caches in a network's code, which may hold meta tensors."""
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
    """Return a copy in evaluation mode with every tensor passed through ``change``."""
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
    """Return the hooks on a module's forward other than torch's own, which compute weights."""
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    return {key: hook for key, hook in hooks.items() if not getattr(hook, "__module__", "").startswith("torch.")}


def _is_triangular(tensor: Tensor) -> bool:
    """Return whether a tensor is a mask that hides later tokens: one value up to the diagonal, and another above."""
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
    recorder = Recorder(
        model, Run(times * samples), {id(tensor) for tensor in (*original.parameters(), *original.buffers())}
    )
    for tensor in tensors_in((args, kwargs)):
        recorder.value_of(tensor).live = True
    with _random_state(), recorder:  # both runs draw the same numbers
        model(*args, **kwargs)
    return recorder.run
