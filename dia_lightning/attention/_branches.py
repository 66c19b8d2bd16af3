"""Which additions of a forward end a residual branch, and which layer makes that branch."""

from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn

from dia_lightning.attention._trace import Addition, Call, Value

#: Operations with weights, by the start of their names.
WEIGHTED = (
    *("conv", "linear", "bilinear", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
    *("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm", "addmm", "einsum"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"),
)
PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum")
_ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")
#: Operations that only move entries.
LAYOUT = {
    *(
        "view",
        "reshape",
        "permute",
        "transpose",
        "transpose_",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "flatten",
    ),
    *("unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "to", "float", "half", "type_as", "type", "roll"),
    *("__get__", "as_subclass", "detach", "view_as", "reshape_as", "expand", "expand_as", "bfloat16"),
}
_DROPOUT = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_SCALE = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply", "div", "div_", "__truediv__", "true_divide"}
_SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
#: Activations that leave 0 as it is, so that a map of 0 before them takes the whole branch away.
_ACTIVATIONS = {
    "relu",
    "relu_",
    "relu6",
    "leaky_relu",
    "gelu",
    "silu",
    "hardswish",
    "elu",
    "selu",
    "mish",
    "tanh",
    "prelu",
}
_NARROWING = {"__getitem__", "chunk", "split", "split_with_sizes", "narrow", "unbind", "select", "tensor_split"}
#: Further operations that are linear, as those of a shortcut are.
_LINEAR = {
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool3d"),
    *(
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "boolean_dispatch",
        "fn",
        "pad",
        "_pad",
        "cat",
        "concat",
        "stack",
        "sum",
    ),
    *(
        "interpolate",
        "upsample",
        "mean",
        "sub",
        "sub_",
        "__sub__",
        "pixel_shuffle",
        "pixel_unshuffle",
        "write",
        "copy_",
    ),
    *("__setitem__", "norm", "index_select", "gather", "_adaptive_max_pool2d", "neg", "lerp", "max", "amax"),
}
#: Normalisations that depend on what they normalise, so that a branch of them is no linear arm.
_DATA_NORMS = ("layer_norm", "group_norm", "instance_norm", "rms_norm")
_UPSAMPLING = ("interpolate", "upsample", "conv_transpose", "pixel_shuffle", "grid_sample")


@dataclass(frozen=True)
class Ending:
    """A layer that ends a residual branch.

    Args:
        path: of the layer in the network.
        before: whether the layer's input ends the branch, and not its output.
        value: what ends the branch.
    """

    path: str
    before: bool
    value: Value


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Args:
        call: of the block, whose code adds.
        kind: ``"attention"``, ``"mlp"`` or ``"conv"``.
        shortcut: what the branch is added to.
        stream: name of the block's argument that the shortcut comes from; ``None`` if that is not one argument.
        endings: the layers that could end it, best first; of a branch that is a sum, those of each summand.
        is_causal: whether it attends to earlier tokens only.
    """

    call: Call
    kind: str
    shortcut: Value
    stream: str | None
    endings: list[list[Ending]]
    is_causal: bool


class NoBranchError(Exception):
    """An addition is none of a branch to a shortcut, or there is no layer that ends the branch."""


#: An addition with the branch that it ends, or with the reason why there is none.
_Found: TypeAlias = "tuple[Addition, Branch | NoBranchError]"


def branches_in(additions: list[Addition]) -> list[_Found]:
    """Return every addition with the branch that it ends, or with the reason why there is none."""
    found: dict[Value, _Found] = {}
    for addition in additions:
        result: Branch | NoBranchError
        try:
            result, inner = _branch(
                addition, {value for value, (_, other) in found.items() if isinstance(other, Branch)}
            )
        except NoBranchError as reason:
            result = reason
        else:
            for value in inner:
                found[value] = found[value][0], NoBranchError("it is a part of a layer that ends a branch itself")
        found[addition.result] = addition, result
    return _in_blocks_around(list(found.values()))


def _in_blocks_around(found: list[_Found]) -> list[_Found]:
    """Leave branches that a part of a block adds, as an output layer may, to the block, if that has one of its own."""
    by_call: dict[Call, list[Branch]] = {}
    for _, branch in found:
        if isinstance(branch, Branch):
            by_call.setdefault(branch.call, []).append(branch)
    around = {}
    for call in by_call:
        parts = [part for part in call.within() if part in by_call]
        if call.outer is not None and len({type(part.module) for part in parts}) == len(parts):  # else they are blocks
            around.update(dict.fromkeys(parts, call))  # the outermost comes last
    result: list[_Found] = []
    for addition, branch in found:
        block = around.get(branch.call) if isinstance(branch, Branch) else None
        own = [] if block is None else [other.shortcut.shape for other in by_call[block]]
        if isinstance(branch, Branch) and block is not None and branch.shortcut.shape in own:
            branch = replace(branch, call=block, stream=_stream(block, branch.shortcut))
        result.append((addition, branch))
    return result


def _branch(addition: Addition, found: set[Value]) -> tuple[Branch, list[Value]]:
    """Return the branch that an addition ends, and the sums inside a layer of it, whose own branches it replaces.

    Args:
        addition: the addition.
        found: sums of branches so far.
    """
    stop, origin = _origin(addition)
    origin = _earlier_origin(addition.operands, origin, stop) or origin
    shortcut, end = _sides(addition.operands, origin, stop)
    between = made_on_the_way(end, origin, stop)
    if all(_is_linear(value) for value in between if value is not origin):
        raise NoBranchError("its branch is linear, as arms that are merged for inference and position encodings are")
    if _merges_resolutions(between, origin, addition):
        raise NoBranchError("it merges features of different resolutions")
    axes = shortcut.channel_axis, end.channel_axis
    if None not in axes and axes[0] != axes[1]:
        raise NoBranchError(f"channels lie on axis {axes[0]} of the shortcut and on axis {axes[1]} of the branch")
    held = [value for value in found & between if value is not origin]
    inner = [value for value in held if value.call is not addition.call]
    if len(inner) > 1 or (held and _light_path(end, origin, stop, slices=False) is not None):
        raise NoBranchError("its branch holds blocks that have branches of their own")
    last = max((value.number for value in held), default=0)
    kind = _kind({value for value in between if value.number > last})
    call: Call | None = addition.call
    reason = None
    while call is not None:  # the sum may be left to a module of its own
        try:
            endings = _Walk(call, between).from_sum(end)
            return Branch(call, kind, shortcut, _stream(call, shortcut), endings, _is_causal(between)), inner
        except NoBranchError as error:
            reason = reason or error
            call = call.outer if not any(value.call is call for value in between) else None
    assert reason is not None
    raise reason


def _origin(addition: Addition) -> tuple[set[Value], Value]:
    """Return the latest value that both operands were made of, and the values at which the search for it ends.

    It is made in the block itself, or in the nearest module around it.
    """
    call: Call | None = addition.call
    while call is not None:
        stop = call.inputs()
        left, right = (ancestors(operand, stop) for operand in addition.operands)
        common = [value for value in left & right if value.live and len(value.shape) >= 3]
        if common:
            return stop, max(common, key=lambda value: value.number)
        call = call.outer
    raise NoBranchError("what is added has no origin in common, as in merges of features and position embeddings")


def _earlier_origin(operands: tuple[Value, Value], origin: Value, stop: set[Value]) -> Value | None:
    """Return what a branch was added to before, where another one of the same normalised features is added next."""
    if any(_light_path(operand, origin, stop, slices=True) is not None for operand in operands):
        return None
    for one, other in (operands, operands[::-1]):
        shared = [value for value in _passed_on(one, stop) & ancestors(other, stop) if value.live]
        earlier = max(shared, key=lambda value: value.number, default=None)
        if earlier is not None and len(earlier.shape) >= 3 and _light_path(other, earlier, stop, slices=False) is None:
            return earlier
    return None


def _passed_on(value: Value, stop: set[Value]) -> set[Value]:
    """Return a value and all that it is a sum of, moved or scaled, without a layer with weights in between."""
    seen, waiting = {value}, [value]
    while waiting:
        current = waiting.pop()
        if current not in stop and _is_light(current, slices=False) and not current.made_by.startswith(WEIGHTED):
            new = [parent for parent in current.parents if parent not in seen]
            seen.update(new)
            waiting.extend(new)
    return seen


def ancestors(value: Value, stop: set[Value]) -> set[Value]:
    """Return a value and all that it was made of, up to some at which to stop."""
    seen, waiting = {value}, [value]
    while waiting:
        current = waiting.pop()
        if current not in stop:
            new = [parent for parent in current.parents if parent not in seen]
            seen.update(new)
            waiting.extend(new)
    return seen


def made_on_the_way(value: Value, origin: Value, stop: set[Value]) -> set[Value]:
    """Return what was made of an origin on the way to a value, with both."""
    made = {origin}
    for current in sorted(ancestors(value, stop), key=lambda current: current.number):
        if current not in stop and any(parent in made for parent in current.parents):
            made.add(current)
    return made


def _sides(operands: tuple[Value, Value], origin: Value, stop: set[Value]) -> tuple[Value, Value]:
    """Tell the shortcut, which is light and linear, from the branch."""
    left, right = operands
    light = [_light_path(operand, origin, stop, slices=False) for operand in operands]
    if light == [None, None]:
        if any(_light_path(operand, origin, stop, slices=True) is not None for operand in operands):
            raise NoBranchError("what is added is a slice of the channels")
        raise NoBranchError("both sides are branches of their own")
    if None not in light:  # a branch of blocks is light too
        depths = [_longest(operand, origin, stop) for operand in operands]
        if depths[0] == depths[1]:
            raise NoBranchError("both sides are as deep as each other, as arms that are merged for inference are")
        return (left, right) if depths[0] < depths[1] else (right, left)
    return (right, left) if light[0] is None else (left, right)


def _light_path(value: Value, origin: Value, stop: set[Value], *, slices: bool) -> int | None:
    """Return the least number of layers with weights on a linear way from an origin; ``None`` if there is none."""
    made: dict[Value, int] = {origin: 0}
    for current in sorted(ancestors(value, stop), key=lambda current: current.number):
        ways = [made[parent] for parent in current.parents if parent in made]
        if current is not origin and current not in stop and ways and _is_light(current, slices):
            made[current] = min(ways) + current.made_by.startswith(WEIGHTED)
    return made.get(value)


def _longest(value: Value, origin: Value, stop: set[Value]) -> int:
    made: dict[Value, int] = {origin: 0}
    for current in sorted(ancestors(value, stop), key=lambda current: current.number):
        ways = [made[parent] for parent in current.parents if parent in made]
        if current is not origin and current not in stop and ways:
            made[current] = max(ways) + current.made_by.startswith(WEIGHTED)
    return made[value]


def _is_light(value: Value, slices: bool) -> bool:
    name = value.made_by
    if name in _NARROWING:
        return slices or _keeps_channels(value)
    return _is_linear(value) or name.startswith(_DATA_NORMS)


def _keeps_channels(value: Value) -> bool:
    """Tell whether an operation that may take a slice takes all channels, as far as is known."""
    if value.made_by not in _NARROWING:
        return True
    sizes = [None if v.channel_axis is None else v.shape[v.channel_axis] for v in (value, value.parents[0])]
    return sizes[0] is not None and sizes[0] == sizes[1]


def _is_linear(value: Value) -> bool:
    """Tell whether an operation is linear in what goes into the network."""
    name = value.made_by
    if name in _SCALE or name in PRODUCTS:
        return sum(parent.live for parent in value.parents) < 2
    if name.startswith(WEIGHTED):
        return name not in _ATTENTION and not name.startswith(_DATA_NORMS)
    return name in LAYOUT or name in _DROPOUT or name in _SUMS or name in _NARROWING or name in _LINEAR


def _merges_resolutions(between: set[Value], origin: Value, addition: Addition) -> bool:
    """Tell whether a branch leaves the resolution of its origin in one child of the block and returns in another."""
    size = origin.shape[2:]
    if len(size) < 1 or addition.result.shape[2:] != size:
        return False
    factors = {parent for value in between if value.made_by in _SCALE for parent in value.parents}
    for value in between - factors - {origin}:  # a gate may be computed at a lower resolution
        if value.made_by.startswith(_UPSAMPLING):
            child = value.call
            while child is not None and child is not addition.call and child.outer is not addition.call:
                child = child.outer
            if child is None or child is addition.call or all(v.shape[2:] != size for v in child.inputs() & between):
                return True
    return False


def _kind(between: set[Value]) -> str:
    """Tell what a branch does: attention, or a convolution with a kernel, or only layers at one position each."""
    for value in between:
        if value.made_by in _ATTENTION:
            return "attention"
        if value.made_by in PRODUCTS and sum(parent.live for parent in value.parents) > 1:
            return "attention"
    convolutions = [value for value in between if value.made_by.startswith("conv") and len(value.parents) > 1]
    return "conv" if any(set(value.parents[1].shape[2:]) - {1} for value in convolutions) else "mlp"


def _is_causal(between: set[Value]) -> bool:
    """Tell whether attention is told to be causal, or its module is, as in transformers, or it has such a mask."""
    for value in between:
        if value.is_causal or getattr(value.call and value.call.module, "is_causal", None) is True:
            return True
        masks = [parent for parent in value.parents if not parent.live]
        if any(made.made_by in ("tril", "triu") for mask in masks for made in ancestors(mask, set())):
            return True
    return False


def _stream(call: Call, shortcut: Value) -> str | None:
    given = call.inputs()
    origins = {value for value in ancestors(shortcut, given) if value in given and value.live}
    names = [name for name, values in call.given.items() if not origins.isdisjoint(values)]
    return names[0] if len(names) == 1 and names[0] else None


class _Walk:
    """The way back from the end of a branch to the layer that makes it."""

    def __init__(self, call: Call, between: set[Value]) -> None:
        self.call = call
        self.between = between
        self.makers: dict[Value, list[Call]] = {}  # innermost first
        self.runs: dict[str, int] = {}
        for inner in call.within():
            self.runs[inner.path] = self.runs.get(inner.path, 0) + 1
            if inner.returned is not None:
                self.makers.setdefault(inner.returned, []).append(inner)

    def from_sum(self, end: Value) -> list[list[Ending]]:
        """Return the layers that could end a branch, best first; of a branch that is a sum, those of each summand."""
        layers: list[Ending] = []  # whose output ends the branch, the latest first
        before: list[Ending] = []  # whose input does
        value, stopped = end, ""
        while True:
            makers = [maker for maker in self.makers.get(value, []) if self.is_usable(maker)]
            passing = {maker: self.passed(maker) for maker in makers}
            here = [Ending(maker.path, False, value) for maker in makers if passing[maker] is None]
            layers = [*here, *layers]
            first = {maker: next(iter(maker.given.values()), []) for maker in makers}
            before = [
                *(Ending(maker.path, True, input) for maker, input in passing.items() if input in first[maker]),
                *before,
            ]
            if value.made_by in _SUMS and value.call is self.call and not layers:
                parts = [parent for parent in value.parents if parent in self.between]
                if len(parts) == len(value.parents) == 2:
                    return [ending for part in parts for ending in self.from_sum(part)]
            upstream = self.step(value, over_activations=not layers)
            if upstream is None:
                stopped = value.made_by
                break
            value = upstream
        if not layers and not before:
            if stopped in ("cat", "concat", "write", "__setitem__") or not _keeps_channels(value):
                raise NoBranchError("what is added is a slice or a concatenation of channels")
            runs = [maker.path for maker in self.makers.get(value, []) if self.runs[maker.path] > 1]
            if runs:
                raise NoBranchError(f"the layer that ends its branch, {runs[0]!r}, runs several times in a block")
            raise NoBranchError(f"its branch ends in {stopped!r} in the code of the block, not in a layer")
        return [[*layers, *before]]

    def is_usable(self, maker: Call) -> bool:
        inside = not self.call.path or maker.path.startswith(f"{self.call.path}.")
        return inside and self.runs[maker.path] == 1 and not isinstance(maker.module, nn.ModuleList | nn.ModuleDict)

    def passed(self, maker: Call) -> Value | None:
        """Return what a layer is given, if it only drops, scales or moves that; else ``None``."""
        inputs, value = maker.inputs(), maker.returned
        while value is not None and value not in inputs:
            value = self.step(value, over_activations=False)
        return value

    def step(self, value: Value, *, over_activations: bool) -> Value | None:
        """Return what a value is the dropped, scaled or moved form of."""
        parents = [parent for parent in value.parents if parent in self.between]
        name = value.made_by
        if value not in self.between or len(parents) != 1:
            return None
        kinds = LAYOUT | _DROPOUT | _SCALE | (_ACTIVATIONS if over_activations else set())
        return parents[0] if name in kinds else None
