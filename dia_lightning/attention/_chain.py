"""How the state of a shared unit travels through a network.

A *tap* stands in the place of a site (the submodule that ends a residual branch), runs it and multiplies its output
by the attention map. A *chain* is the sequence of blocks whose taps share one unit. The class of every block of a
chain is replaced by a subclass whose ``forward`` opens a frame, runs the block's own ``forward`` and hands the state
on to the next block.

The state rides on the activation: a block notes it on the tensor it returns, and the next block reads it from the
tensor it is given. A non-reentrant activation checkpoint passes that very tensor again, so a block that is recomputed
in backward finds the state it was entered with, and two streams that go through a stage in turn cannot mix. Where
code stands between two blocks the chain itself, which is per thread, hands the state on; under ``torch.compile`` and
``torch.export`` it always does.

The one thing that cannot be told apart is two streams with code between the blocks of which one is given up in
mid-stage.

Module types instead of forward hooks, because compilers do not guard on hooks and norm conversion drops them.
"""

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn


class Handover(NamedTuple):
    """What a block hands on to the next block of its chain."""

    unit: nn.Module
    state: Any
    position: int  # of the block that hands it on; -1 before the first block has finished
    task: int  # backward pass in which it was made; -1 outside of one
    grad: bool  # whether autograd recorded how it was made


class Frame:
    """One call of a block that is under way."""

    def __init__(self, unit: nn.Module, state: Any) -> None:
        self.unit = unit
        self.state = state
        self.taps = 0


class Chain(threading.local):
    """The calls of one chain that are under way in this thread. Copies and unpickled instances start empty."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []  # blocks under way, innermost last
        self.handovers: list[Handover] = []  # one per forward of the chain that is under way

    def __deepcopy__(self, memo: dict[int, Any]) -> "Chain":
        return Chain()

    def __reduce__(self) -> tuple[type["Chain"], tuple[()]]:
        return Chain, ()


class Link(NamedTuple):
    """A block's place in its chain."""

    chain: Chain
    position: int
    last: bool
    taps: int  # taps inside the block; 0 for a block that only hands the state on


class _Notes(dict[Chain, Handover]):
    """Handovers noted on an activation. They stay behind when the tensor is copied or saved."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Notes":
        return _Notes()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # loads with weights_only=True


#: Under this name a tap holds its site. It is the one name that FSDP and distributed checkpoints of torch leave out
#: of the names of parameters (``torch.distributed.algorithms._checkpoint.checkpoint_wrapper``), as the tap's own
#: state dict does.
TAPPED = "_checkpoint_wrapped_module"


class Tap(nn.Module):
    """Stands in the place of a site: runs it and multiplies its output by the attention map of the running block.

    The state dict keeps the keys of the plain network: what the tap holds appears under the site's own name.

    Args:
        site: the submodule that ends a residual branch.
        chain: the chain that the tap belongs to.
        before: whether the site's input is multiplied, and not its output.
        channels_last: whether channels are the last dimension of the features.
        branch_norm: a norm between the site and the unit, for branches that do not end in one.
    """

    unit_norm: nn.Module | None

    def __init__(
        self,
        site: nn.Module,
        chain: Chain,
        *,
        before: bool = False,
        channels_last: bool = False,
        branch_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.chain = chain
        self.before = before
        self.channels_last = channels_last
        self.add_module(TAPPED, site)
        self.branch_norm = branch_norm
        self.unit_norm = None
        self.register_load_state_dict_post_hook(_name_as_in_plain_network)  # type: ignore[no-untyped-call]

    @property
    def tapped(self) -> nn.Module:
        """The site."""
        return self._modules[TAPPED]  # type: ignore[return-value]  # never None

    def __getattr__(self, name: str) -> Any:
        """Find attributes of the site, such as its weight, where they were."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if TAPPED not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.tapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Put tensors of the site where they are used: ``functional_call`` writes them under their plain names."""
        tapped = self.__dict__.get("_modules", {}).get(TAPPED)
        for own in () if tapped is None else (tapped._parameters, tapped._buffers):
            if name in own:
                own[name] = value
                return
        super().__setattr__(name, value)

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.before:
            return self.tapped(self._recalibrate(features), *args, **kwargs)
        return self._recalibrate(self.tapped(features, *args, **kwargs))

    def _recalibrate(self, features: Tensor) -> Tensor:
        if self.branch_norm is not None:
            features = self.branch_norm(features)
        if features.ndim < 3:
            raise RuntimeError(
                f"Features of shape {tuple(features.shape)} have no positions to attend to: "
                f"{type(self.tapped).__name__} is no end of a residual branch. Leave it out of `sites`."
            )
        if not self.channels_last:
            return features * self._attention_map(features)
        planes = features.movedim(-1, 1)  # [B, ..., C] -> [B, C, ...]
        if planes.ndim == 4:
            return features * self._attention_map(planes).movedim(1, -1)
        attention_map = self._attention_map(planes.unsqueeze(-1))  # tokens are a plane of width one: [B, C, N, 1]
        return features * attention_map.squeeze(-1).movedim(1, -1)

    def _attention_map(self, features: Tensor) -> Tensor:
        """Return the map of features [B, C, H, W] from the unit of the running block, and step its state."""
        if not self.chain.frames:
            raise RuntimeError(
                "A site with attention was called outside of its block, so there is no attention state for it. "
                "Call the block, or detach() the network first."
            )
        frame = self.chain.frames[-1]
        frame.taps += 1
        attention_map: Tensor
        if self.unit_norm is None:
            attention_map, frame.state = frame.unit(features, frame.state)
        else:
            attention_map, frame.state = frame.unit(features, frame.state, norm=self.unit_norm)
        return attention_map

    def state_dict(  # type: ignore[override]  # torch types the three overloads of its own signature only
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()  # type: ignore[attr-defined]  # as nn.Module.state_dict does
        for name, child in self.named_children():
            inner = prefix if name == TAPPED else f"{prefix}{name}."
            child.state_dict(destination=destination, prefix=inner, keep_vars=keep_vars)
        metadata = destination._metadata  # type: ignore[attr-defined]  # versions, read under the names of the modules
        metadata[f"{prefix}{TAPPED}"] = metadata[prefix.removesuffix(".")]
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.__dict__["_load_errors"] = args[-1]  # filled by the site later, under its inner name
        own = tuple(f"{prefix}{name}." for name, _ in self.named_children() if name != TAPPED)
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[f"{prefix}{TAPPED}.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _name_as_in_plain_network(module: nn.Module, incompatible: Any) -> None:
    errors = module.__dict__.pop("_load_errors")
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys, errors):
        keys[:] = [key.replace(f".{TAPPED}.", ".") for key in keys]


class AttachedBlock(nn.Module):
    """Mixed into the class of every block of a chain. The first block of the chain also holds the unit, as ``dia``."""

    plain_class: type[nn.Module]
    dia_link: Link
    dia: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        link = self.dia_link
        frame = _enter(self, link, _tensors((*args, *kwargs.values())))
        link.chain.frames.append(frame)
        finished = False
        try:
            output = super().forward(*args, **kwargs)
            finished = True
        finally:
            link.chain.frames.pop()
            if not finished:
                _drop_handover(link.chain)
        _leave(link, frame, output)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return new_attached_block, (self.plain_class,), *reduced[2:]


_attached_classes: dict[type[nn.Module], type[AttachedBlock]] = {}


def attached_class(plain_class: type[nn.Module]) -> type[AttachedBlock]:
    """Return the subclass of a block's class that carries attention: one per class, so that instances pickle."""
    if plain_class not in _attached_classes:
        names = {name: getattr(plain_class, name) for name in ("__module__", "__qualname__", "__doc__")}
        names["plain_class"] = plain_class
        _attached_classes[plain_class] = type(plain_class.__name__, (AttachedBlock, plain_class), names)
    return _attached_classes[plain_class]


def new_attached_block(plain_class: type[nn.Module]) -> AttachedBlock:
    """Make an empty instance, for ``copy`` and ``pickle`` to fill."""
    block_class = attached_class(plain_class)
    return block_class.__new__(block_class)


def _enter(block: AttachedBlock, link: Link, entries: list[Tensor]) -> Frame:
    """Open a frame with the unit and the state that the block before handed on."""
    chain, compiling = link.chain, torch.compiler.is_compiling()
    if link.position == 0:
        task = _backward_task()
        if not chain.frames:
            chain.handovers.clear()  # of forwards that were abandoned in mid-stage
        if task != -1:
            _forget_after_backward(chain.handovers, task)
        chain.handovers.append(Handover(block.dia, None, -1, task, torch.is_grad_enabled()))
        return Frame(block.dia, None)
    handover = _handed_on(chain) if compiling else _find_handover(link, entries)
    if handover is None or not 0 <= handover.position < link.position:
        raise RuntimeError(_no_state_message(link))
    wants_grad = not compiling and torch.is_grad_enabled() and any(entry.requires_grad for entry in entries)
    if wants_grad and not handover.grad:
        raise RuntimeError(
            "Gradients through the attention state would be lost: the block before was run without autograd, as "
            "reentrant activation checkpointing of single blocks does. Pass use_reentrant=False to "
            "torch.utils.checkpoint.checkpoint, or checkpoint whole stages."
        )
    return Frame(handover.unit, handover.state)


def _leave(link: Link, frame: Frame, output: Any) -> None:
    """Check that every tap of the block has run, and hand the state on."""
    chain = link.chain
    if frame.taps != link.taps:
        _drop_handover(chain)
        raise RuntimeError(
            f"{frame.taps} of {link.taps} sites with attention ran in one call of a block. Was a module of the block "
            "replaced after attach()? Call detach() first, replace it, then attach() again."
        )
    task = _backward_task()
    handover = Handover(frame.unit, frame.state, link.position, task, torch.is_grad_enabled())
    if chain.handovers and chain.handovers[-1].task == task:
        if link.last:
            chain.handovers.pop()
        else:
            chain.handovers[-1] = handover
    if not link.last and not torch.compiler.is_compiling():
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                _note(tensor, chain, handover)


def _drop_handover(chain: Chain) -> None:
    """Forget the forward in which a block has just raised."""
    if chain.handovers and chain.handovers[-1].task == _backward_task():
        chain.handovers.pop()


def _forget_after_backward(handovers: list[Handover], task: int) -> None:
    """A block that is recomputed alone hands its state on to nobody."""

    def forget() -> None:
        handovers[:] = [handover for handover in handovers if handover.task != task]

    torch.autograd.Variable._execution_engine.queue_callback(forget)  # as DDP does


def _handed_on(chain: Chain) -> Handover | None:
    """Return what the chain handed on last in this pass: forward and recomputation in backward must not mix."""
    if chain.handovers and chain.handovers[-1].task == _backward_task():
        return chain.handovers[-1]
    return None


def _backward_task() -> int:
    # Private, but what torch.utils.checkpoint itself asks to know whether it runs inside backward.
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _find_handover(link: Link, entries: list[Tensor]) -> Handover | None:
    """Return what the nearest block before noted on the tensors that this block is given, or handed to the chain."""
    notes = [tensor.__dict__["_dia_notes"].get(link.chain) for tensor in entries if "_dia_notes" in tensor.__dict__]
    earlier = [note for note in notes if note is not None and note.position < link.position]
    noted: Handover | None = max(earlier, key=lambda note: note.position, default=None)
    if noted is not None and noted.position == link.position - 1:
        return noted
    handed_on = _handed_on(link.chain)
    if handed_on is None or (noted is not None and handed_on.position != link.position - 1):
        return noted  # a block was skipped
    for tensor in entries:
        if tensor.grad_fn is not None:  # not a mask or a buffer, which the next forward is given too
            _note(tensor, link.chain, handed_on)  # so that a recomputation of this block finds it
            break
    return handed_on


def _note(tensor: Tensor, chain: Chain, handover: Handover) -> None:
    notes = tensor.__dict__.get("_dia_notes")
    if notes is None:
        notes = tensor._dia_notes = _Notes()  # type: ignore[attr-defined]  # rides on the activation
    notes[chain] = handover


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    if any(isinstance(value, torch.fx.Proxy) for value in values):
        raise RuntimeError(
            "torch.fx cannot trace through a block with shared attention. Make the block classes leaves, for "
            "example create_feature_extractor(..., tracer_kwargs={'leaf_modules': [type(model.layer1[0])]})."
        )
    return [value for value in values if isinstance(value, Tensor)]


def _no_state_message(link: Link) -> str:
    return (
        f"Block {link.position} of a stage with shared attention was called without the state of the blocks before it. "
        "Run the blocks of a stage in order, each once per forward. With activation checkpointing of single blocks "
        "use use_reentrant=False (and no save_on_cpu), or checkpoint whole stages."
    )
