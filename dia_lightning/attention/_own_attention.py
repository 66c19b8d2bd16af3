"""A network's own attention modules, such as the squeeze-and-excitation of EfficientNets.

A module is one if it multiplies its input by fewer values that it computes from that input with weights: one per
channel, or one per position. This finds the classes of timm and torchvision as well as custom ones.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dia_lightning.attention._found_sites import Streams, axes_of, site_at
from dia_lightning.attention._graph import Call, Run, Value, ancestors, made_on_the_way
from dia_lightning.attention._links import tensors_in
from dia_lightning.attention._operations import LAYOUT, MULTIPLIES, PRODUCTS, WEIGHTED
from dia_lightning.attention._roles import Role
from dia_lightning.attention._sites import LeftOut, Site


def own_attention(once: Run, twice: Run) -> tuple[list[Site], list[LeftOut]]:
    """Return the attention modules of a network in the order in which they run, and those whose axes are unknown.

    Args:
        once: a forward of the network.
        twice: one with twice as many samples.
    """
    again = {call.path: call for call in reversed(twice.calls)}
    sites, left_out, lanes = [], [], Streams()
    for call in _outermost(once):
        features, more = _multiplied(call), _multiplied(again[call.path])
        block = _block_around(call)
        if features is None or more is None:
            continue
        axes = _axes(call, block, features, more, once)
        if isinstance(axes, str):
            left_out.append(LeftOut(block.path, f"its own attention {call.path!r} {axes}"))
            continue
        origins = ancestors(features, block.inputs())
        streams = [name for name, values in block.given.items() if name and not origins.isdisjoint(values)]
        stream = streams[0] if len(streams) == 1 else None
        assert call.returned is not None
        site = site_at(call.path, block.path, features, axes, stream=stream)
        sites.append(lanes.numbered(site, features, call.returned))
    return sites, left_out


def _axes(call: Call, block: Call, features: Value, more: Value, run: Run) -> tuple[int, int] | str:
    """Return the channel and sample axes of an attention module's input, or why it is left out."""
    if not call.is_simple:
        return "takes or returns more than features"
    if not (run.is_only_in(call.path, block.path) and call.path.startswith(f"{block.path}.".lstrip("."))):
        return "is used by several blocks"
    return axes_of(features, more, run.samples)


def _outermost(run: Run) -> Iterator[Call]:
    """Yield the first call of each attention module that is not part of another one."""
    found: dict[str, Call] = {}
    for call in reversed(run.calls):  # those around others end after them
        if _multiplied(call) is not None and not any(call.path.startswith(f"{path}.") for path in found):
            found[call.path] = call
    yield from reversed(found.values())


def _block_around(call: Call) -> Call:
    block = call.outer
    assert block is not None
    while block.outer is not None and isinstance(block.module, nn.Sequential):
        block = block.outer
    return block


def _multiplied(call: Call) -> Value | None:
    """Return the input that a module multiplies by fewer values computed from it; ``None`` if it does not.

    Several such steps, as in CBAM, are one module.
    """
    given, value, gates = call.inputs(), call.returned, 0
    while value is not None and value not in given:
        live = [parent for parent in value.parents if parent.live]
        if value.made_by in LAYOUT and len(live) == 1:
            value = live[0]
        elif value.made_by in MULTIPLIES and len(live) == 2:
            mains = [main for main in live if main.shape == value.shape and _is_gate(_other(live, main), main, given)]
            value = mains[0] if mains else None
            gates += 1
        else:
            return None
    return value if value is not None and gates and value.live and call.outer is not None else None


def _other(pair: list[Value], one: Value) -> Value:
    return pair[1] if pair[0] is one else pair[0]


def _is_gate(gate: Value, features: Value, given: set[Value]) -> bool:
    while gate.made_by in ("expand", "expand_as") and gate.parents:
        gate = gate.parents[0]
    way = made_on_the_way(gate, features, given)
    has_weights = any(value.made_by.startswith(WEIGHTED) or value.made_by in PRODUCTS for value in way)
    return gate in way and has_weights and gate.numel < features.numel


class SharedModule(nn.Module):
    """A unit made from a network's own attention modules, called as they were.

    Args:
        modules: the modules it replaces, of one class and with weights of the same shapes.
        start: the ``"mean"`` of their weights, or those of the ``"first"``.
    """

    def __init__(self, modules: list[nn.Module], start: Literal["mean", "first"]) -> None:
        super().__init__()
        self.module = copy.deepcopy(modules[0])
        if start == "mean":
            with torch.no_grad():
                for name, value in self.module.state_dict().items():
                    if value.is_floating_point():
                        value.copy_(torch.stack([module.state_dict()[name] for module in modules]).mean(0))

    def forward(self, features: Any) -> Any:
        """Return the features, multiplied."""
        return self.module(features)


class WatchedModule(Role):
    """Role of an attention module of a network whose maps are watched."""

    rank = 5
    equals_plain = True
    dia_watcher: Callable[[Tensor, Any], None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return watched(super().__call__, *args, watcher=self.dia_watcher, **kwargs)


def watched(
    module: Callable[..., Any], *args: Any, watcher: Callable[[Tensor, Any], None] | None, **kwargs: Any
) -> Any:
    """Call an attention module of a network, and pass its map to the watcher, if any."""
    if watcher is None:
        return module(*args, **kwargs)
    with _Multiplications() as seen:
        output = module(*args, **kwargs)
    factors = seen.factors(output, tensors_in((args, kwargs)))
    if not factors:
        raise RuntimeError(
            "The maps of this network's own attention cannot be watched: in this forward a module does not multiply "
            "its input, as it did when the network was traced."
        )
    watcher(functools.reduce(torch.mul, factors), None)
    return output


class _Multiplications(TorchFunctionMode):
    """Notes what was multiplied by what and what was only moved."""

    def __init__(self) -> None:
        super().__init__()
        # id of a result -> the result, to keep it alive, and its operands; several if it was written in place
        self.made: dict[int, list[tuple[Tensor, list[Tensor]]]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if (name in MULTIPLIES or name in LAYOUT) and isinstance(output, Tensor):
            given = tensors_in((args, kwargs or {}))
            if name in LAYOUT or len(given) == 2:
                self.made.setdefault(id(output), []).append((output, given[:2] if name in MULTIPLIES else given[:1]))
        return output

    def factors(self, output: Tensor, given: list[Tensor]) -> list[Tensor] | None:
        """Return what one of the given tensors was multiplied by to make an output; ``None`` if it was made otherwise.

        This consumes the notes on the output.
        """
        steps = self.made.get(id(output))
        if not steps:
            return [] if any(output is tensor for tensor in given) else None
        _, parts = steps.pop()
        for number, main in enumerate(parts):
            found = self.factors(main, given)
            if found is not None:
                return found + [part for other, part in enumerate(parts) if other != number]
        return None
