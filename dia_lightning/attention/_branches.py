"""Which additions of a forward end a residual branch."""

from dataclasses import dataclass, replace
from typing import TypeAlias

from dia_lightning.attention._graph import Addition, Call, Value, ancestors, made_on_the_way
from dia_lightning.attention._operations import (
    ATTENTION,
    DATA_NORMS,
    DROPOUT,
    LAYOUT,
    LINEAR,
    NARROWING,
    PRODUCTS,
    SCALE,
    SUMS,
    UPSAMPLING,
    WEIGHTED,
)
from dia_lightning.attention._walk import Ending, NoBranchError, Walk, keeps_channels


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Args:
        call: of the block whose code adds.
        kind: ``"attention"``, ``"mlp"`` or ``"conv"``.
        shortcut: what the branch is added to.
        stream: name of the block's argument that the shortcut comes from; ``None`` if it is not a single argument.
        endings: the layers that could end it, best first; for a branch that is a sum, those of each summand.
        is_causal: whether it attends only to earlier tokens.
    """

    call: Call
    kind: str
    shortcut: Value
    stream: str | None
    endings: list[list[Ending]]
    is_causal: bool


#: An addition with the branch it ends, or the reason why it ends none.
_Found: TypeAlias = "tuple[Addition, Branch | NoBranchError]"


def branches_in(additions: list[Addition]) -> list[_Found]:
    """Return every addition with the branch it ends, or the reason why it ends none."""
    found: dict[Value, _Found] = {}
    sums: set[Value] = set()  # of branches
    for addition in additions:
        result: Branch | NoBranchError
        try:
            result, inner = _branch(addition, sums)
        except NoBranchError as reason:
            result = reason
        else:
            sums = {*sums, addition.result}.difference(inner)
            for value in inner:
                found[value] = found[value][0], NoBranchError("it is a part of a layer that ends a branch itself")
        found[addition.result] = addition, result
    return _in_blocks_around(list(found.values()))


def _in_blocks_around(found: list[_Found]) -> list[_Found]:
    """Assign branches added by a part of a block, such as an output layer, to the block if it has its own branch."""
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
    """Return the branch an addition ends, and the sums inside a layer of it whose own branches it replaces.

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
    if len(inner) > 1 or (held and _is_light_from(end, origin, stop)):
        raise NoBranchError("its branch holds blocks that have branches of their own")
    last = max((value.number for value in held), default=0)
    kind = _kind({value for value in between if value.number > last})
    call: Call | None = addition.call
    reason = None
    while call is not None:  # a separate module may do the sum
        try:
            endings = Walk(call, between).from_sum(end)
            return Branch(call, kind, shortcut, _stream(call, shortcut), endings, _is_causal(between)), inner
        except NoBranchError as error:
            reason = reason or error
            call = call.outer if not any(value.call is call for value in between) else None
    assert reason is not None
    raise reason


def _origin(addition: Addition) -> tuple[set[Value], Value]:
    """Return the latest value that both operands derive from, and the values at which the search stops.

    It is made in the block itself or in the nearest module around it.
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
    """Return what an earlier branch was added to, if another one of the same normalised features is added next."""
    if any(_is_light_from(operand, origin, stop, slices=True) for operand in operands):
        return None
    for one, other in (operands, operands[::-1]):
        shared = [value for value in _passed_on(one, stop) & ancestors(other, stop) if value.live]
        earlier = max(shared, key=lambda value: value.number, default=None)
        if earlier is not None and len(earlier.shape) >= 3 and not _is_light_from(other, earlier, stop):
            return earlier
    return None


def _passed_on(value: Value, stop: set[Value]) -> set[Value]:
    """Return a value and everything it sums, moves or scales, without a layer with weights in between."""
    seen, waiting = {value}, [value]
    while waiting:
        current = waiting.pop()
        if current not in stop and _is_light(current, slices=False) and not current.made_by.startswith(WEIGHTED):
            new = [parent for parent in current.parents if parent not in seen]
            seen.update(new)
            waiting.extend(new)
    return seen


def _sides(operands: tuple[Value, Value], origin: Value, stop: set[Value]) -> tuple[Value, Value]:
    """Return the shortcut, which is light and linear, and the branch."""
    left, right = operands
    light = [_is_light_from(operand, origin, stop) for operand in operands]
    if not any(light):
        if any(_is_light_from(operand, origin, stop, slices=True) for operand in operands):
            raise NoBranchError("what is added is a slice of the channels")
        raise NoBranchError("both sides are branches of their own")
    if all(light):  # a branch of blocks is light too
        depths = [_longest(operand, origin, stop) for operand in operands]
        if depths[0] == depths[1]:
            raise NoBranchError("both sides are as deep as each other, as arms that are merged for inference are")
        return (left, right) if depths[0] < depths[1] else (right, left)
    return (left, right) if light[0] else (right, left)


def _is_light_from(value: Value, origin: Value, stop: set[Value], *, slices: bool = False) -> bool:
    """Return whether a linear path leads from an origin to a value, as in a shortcut."""
    made = {origin}
    for current in sorted(ancestors(value, stop), key=lambda current: current.number):
        if current not in stop and not made.isdisjoint(current.parents) and _is_light(current, slices):
            made.add(current)
    return value in made


def _longest(value: Value, origin: Value, stop: set[Value]) -> int:
    """Return the largest number of layers with weights on a path from an origin to a value."""
    made: dict[Value, int] = {origin: 0}
    for current in sorted(ancestors(value, stop), key=lambda current: current.number):
        ways = [made[parent] for parent in current.parents if parent in made]
        if current is not origin and current not in stop and ways:
            made[current] = max(ways) + current.made_by.startswith(WEIGHTED)
    return made[value]


def _is_light(value: Value, slices: bool) -> bool:
    name = value.made_by
    if name in NARROWING:
        return slices or keeps_channels(value)
    return _is_linear(value) or name.startswith(DATA_NORMS)


def _is_linear(value: Value) -> bool:
    """Return whether an operation is linear in the network's input."""
    name = value.made_by
    if name in SCALE or name in PRODUCTS:
        return sum(parent.live for parent in value.parents) < 2
    if name.startswith(WEIGHTED):
        return name not in ATTENTION and not name.startswith(DATA_NORMS)
    return name in LAYOUT or name in DROPOUT or name in SUMS or name in NARROWING or name in LINEAR


def _merges_resolutions(between: set[Value], origin: Value, addition: Addition) -> bool:
    """Return whether a branch leaves the resolution of its origin in one child of the block and returns in another."""
    size = origin.shape[2:]
    if len(size) < 1 or addition.result.shape[2:] != size:
        return False
    factors = {parent for value in between if value.made_by in SCALE for parent in value.parents}
    for value in between - factors - {origin}:  # a gate may be computed at a lower resolution
        if value.made_by.startswith(UPSAMPLING):
            child = value.call
            while child is not None and child is not addition.call and child.outer is not addition.call:
                child = child.outer
            if child is None or child is addition.call or all(v.shape[2:] != size for v in child.inputs() & between):
                return True
    return False


def _kind(between: set[Value]) -> str:
    """Return the kind of a branch: attention, a convolution with a kernel larger than 1, or only pointwise layers."""
    for value in between:
        if value.made_by in ATTENTION:
            return "attention"
        if value.made_by in PRODUCTS and sum(parent.live for parent in value.parents) > 1:
            return "attention"
    convolutions = [value for value in between if value.made_by.startswith("conv") and len(value.parents) > 1]
    return "conv" if any(set(value.parents[1].shape[2:]) - {1} for value in convolutions) else "mlp"


def _is_causal(between: set[Value]) -> bool:
    """Return whether attention is called as causal, belongs to a causal module (transformers) or has a causal mask."""
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
