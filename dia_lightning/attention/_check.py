"""Check on a user's network that attaching broke nothing."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dia_lightning._extras import require
from dia_lightning.attention._attach import detach
from dia_lightning.attention._attached_block import AttachedBlock, is_attached
from dia_lightning.attention._links import tensors_in
from dia_lightning.attention._trace import arguments_of
from dia_lightning.attention.watching import watch_maps

#: Largest difference, relative to the largest output, that counts as equal when the arithmetic is the same.
EXACT = 1e-5


@dataclass(frozen=True)
class Row:
    """One line of a report: what was checked, whether it holds, and what to do or what was measured."""

    name: str
    holds: bool
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What holds on an attached network. Printing it gives a table: OK, NO, or -- for what could not be checked."""

    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(row.holds for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        marks = ["--" if row.note.startswith("not checked") else "OK" if row.holds else "NO" for row in self.rows]
        lines = [
            f"{row.name:<{width}}  {mark}  {row.note}".rstrip() for mark, row in zip(marks, self.rows, strict=True)
        ]
        return "\n".join(lines)


def check(model: nn.Module, example_input: Any, *, slow: bool = False) -> Report:
    """Check what holds on a network with attention, on copies of it.

    Args:
        model: a network that :func:`~dia_lightning.attention.attach` was applied to.
        example_input: input of the network: a tensor, a tuple of arguments, or a mapping of keyword arguments. The
            first tensor should hold at least two samples.
        slow: also compile the network after compiling a plain copy, which takes a minute or more.

    Returns:
        A report whose rows say OK, or what to do.

    Raises:
        ValueError: if no attention is attached, or the network does not run on the example.

    Example:
        >>> import torch
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> report = check(attach(get_model("cifar_resnet", depth=20), "dia-lstm"), torch.randn(2, 3, 32, 32))
        >>> report.ok
        True
    """
    if not is_attached(model):
        raise ValueError("No attention is attached to this network. Call attach(model, ...) first.")
    if type(model).__module__.startswith("torchvision.models.detection") and hasattr(model, "backbone"):
        raise ValueError(
            "A detector returns losses or lists of boxes, which cannot be compared. Check the module with attention: "
            "check(detector.backbone, torch.randn(2, 3, 64, 64))."
        )
    subject = _Subject(model, example_input)
    rows = []
    for name, examine in _EXAMINATIONS.items():
        rows.append(_examine(name, examine, subject))
    if slow:
        rows.append(_examine("torch.compile after a plain copy was compiled", _compiles, subject))
    return Report(rows)


class _Subject:
    """A network in evaluation mode, its input and its output."""

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self.network = copy.deepcopy(model).eval()
        self.args, self.kwargs = arguments_of(example_input)
        with torch.no_grad():  # units that start at zero or at the identity would make some comparisons vacuous
            generator = torch.Generator().manual_seed(0)
            for unit in self.units():
                for parameter in unit.parameters():
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
        try:
            self.output = self.run(self.network)
        except Exception as error:
            raise ValueError(f"The network does not run on the example input: {error}") from error
        if not all(tensor.isfinite().all() for tensor in self.output):
            raise ValueError("The network returns NaN or infinity for the example input, so nothing can be compared.")

    def run(self, network: nn.Module, *, grad: bool = False) -> list[Tensor]:
        """Return all output tensors of a network."""
        with torch.set_grad_enabled(grad):
            return _tensors(network(*self.args, **self.kwargs))

    def plain(self) -> "_Subject":
        """Return the network without attention."""
        return _Subject(detach(self.copy()), self.kwargs or self.args)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.network)

    def units(self, network: nn.Module | None = None) -> list[nn.Module]:
        modules = (self.network if network is None else network).modules()
        return [unit for block in modules if isinstance(block, AttachedBlock) for unit in block.dia_units()]

    def difference(self, output: list[Tensor]) -> float:
        """Return the largest difference from the network's output, relative to its largest entry."""
        return _difference(self.output, output)

    def gradients(self, network: nn.Module) -> list[Tensor | None]:
        network.zero_grad()
        asked = _changed(self, lambda tensor: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor)
        losses = [tensor.float().square().mean() for tensor in asked.run(network, grad=True)]
        torch.autograd.backward(losses)
        return [parameter.grad for parameter in network.parameters()]


#: A finding: whether it holds, and a note.
_Finding = tuple[bool, str]


def _examine(name: str, examine: Callable[[_Subject], _Finding], subject: _Subject) -> Row:
    row = _row(name, examine, subject)
    if not row.holds and name in _OF_THE_NETWORK:
        plain = _row(name, examine, subject.plain())
        if not plain.holds:
            return Row(name, True, f"not checked: the plain network fails too ({plain.note})")
    return row


def _row(name: str, examine: Callable[[_Subject], _Finding], subject: _Subject) -> Row:
    try:
        return Row(name, *examine(subject))
    except Exception as error:  # a check that raises is a row of the report, whatever the network does
        return Row(name, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _finding(holds: bool, note: str) -> _Finding:
    """Return a finding, with the note only if it does not hold."""
    return holds, "" if holds else note


def _equal(subject: _Subject, output: list[Tensor]) -> _Finding:
    difference = subject.difference(output)
    return _finding(difference <= EXACT, f"differs by {difference:.1e}")


def _every_site_runs(subject: _Subject) -> _Finding:
    network, seen = subject.copy(), set[int]()
    with watch_maps(network, lambda layer, *_: seen.add(layer)) as layers:
        subject.run(network)
    chains = {id(chain): chain for module in network.modules() for chain in vars(module).get("dia_chains", ())}
    gone = sum(len(link.slots) for chain in chains.values() for link in chain.links) - len(layers)
    if gone > 0:
        return False, f"{gone} sites are gone: replace whole blocks before attach(); layers inside them any time"
    missed = [layer.path for number, layer in enumerate(layers) if number not in seen]
    if missed:
        return False, f"{len(missed)} of {len(layers)} did not run, for example {missed[0]}: is the block used at all?"
    return True, f"{len(layers)} sites, {len(subject.units())} units"


def _parameters_train(subject: _Subject) -> _Finding:
    network = subject.copy().train()
    own = {parameter for unit in subject.units(network) for parameter in unit.parameters()}
    units = {name for name, parameter in network.named_parameters() if parameter in own}
    subject.gradients(network)
    without = [name for name, parameter in network.named_parameters() if name in units and parameter.grad is None]
    if without:
        return False, f"no gradient for {without[0]} and {len(without) - 1} more: freeze or unplug what is not used"
    return True, f"{len(units)} tensors"


def _nothing_is_left(subject: _Subject) -> _Finding:
    made: list[weakref.ref[Tensor]] = []

    def note(_: int, attention_map: Tensor, state: Any) -> None:
        made.extend(map(weakref.ref, (attention_map, *tensors_in(state))))

    network = subject.copy()
    with watch_maps(network, note):
        subject.run(network)
    held = sum(tensor() is not None for tensor in made)
    return _finding(held == 0, f"{held} of {len(made)} maps and states are held: does the unit keep them?")


def _copies_are_independent(subject: _Subject) -> _Finding:
    network = subject.copy()
    if subject.difference(subject.run(network)) > EXACT:
        return False, "a deep copy computes something else"
    if _branches_are_zero(subject):
        return True, "not checked: all branches are 0, as when their last norms start at 0"
    with torch.no_grad():
        for unit in subject.units(network):
            for parameter in unit.parameters():
                parameter.add_(0.5)
    if subject.difference(subject.run(network)) == 0:
        return False, "a copy's attention has no effect on the copy"
    same = subject.difference(subject.run(subject.network)) <= EXACT
    return _finding(same, "changing a copy changes the network: they share tensors")


def _branches_are_zero(subject: _Subject) -> bool:
    network, seen = subject.copy(), []
    for block in [module for module in network.modules() if isinstance(module, AttachedBlock)]:
        for site in block.dia_sites():
            site.register_forward_hook(lambda _, __, output: seen.extend(_tensors(output)[:1]))
    subject.run(network)
    return all(not features.any() for features in seen)


def _pickles(subject: _Subject) -> _Finding:
    return _equal(subject, subject.run(pickle.loads(pickle.dumps(subject.network))))


def _averages(subject: _Subject) -> _Finding:
    averaged = AveragedModel(subject.network)
    averaged.update_parameters(subject.network)
    return _equal(subject, subject.run(averaged.module.eval()))


def _weights_survive(subject: _Subject) -> _Finding:
    file = io.BytesIO()
    torch.save(subject.network.state_dict(), file)
    file.seek(0)
    network = subject.copy()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    network.load_state_dict(torch.load(file, weights_only=True))
    return _equal(subject, subject.run(network))


def _saves_as_safetensors(subject: _Subject) -> _Finding:
    try:
        safetensors = require("safetensors.torch", by="it")
    except ImportError as error:
        return True, f"not checked: {error}"
    network = subject.copy()
    network.load_state_dict(
        safetensors.load(safetensors.save({key: value.contiguous() for key, value in network.state_dict().items()}))
    )
    pointers = [value.data_ptr() for value in network.state_dict().values() if value.numel()]
    return _finding(len(pointers) == len(set(pointers)), "tensors are shared")


def _plain_weights_fit(subject: _Subject) -> _Finding:
    plain = detach(subject.copy())
    network = subject.copy()
    names = [name for name, _ in network.named_parameters()]
    lost = [name for name, _ in plain.named_parameters() if name not in names]
    unexpected = network.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    own = tuple(
        f"{path}.{slot}.".lstrip(".")
        for path, block in network.named_modules()
        if isinstance(block, AttachedBlock)
        for slot in block.dia_taken_out()
    )
    differing = [name for name in (*lost, *unexpected) if not name.startswith(own)]
    return _finding(not differing, f"names differ: {differing[:3]}")


def _history_does_not_matter(subject: _Subject) -> _Finding:
    network = subject.copy()
    other = _changed(subject, lambda tensor: torch.randn_like(tensor) if tensor.is_floating_point() else tensor)
    with torch.no_grad():
        network(*other.args, **other.kwargs)
    return _equal(subject, subject.run(network))


def _batch_mates_do_not_matter(subject: _Subject) -> _Finding:
    size = len(_tensors((subject.args, subject.kwargs))[0])
    if size < 2:
        return True, "not checked: the example has one sample"

    def replace(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.ndim < 2 or len(tensor) != size:
            return tensor
        return torch.cat([tensor[:1], torch.randn_like(tensor[1:])])

    other = _changed(subject, replace)
    with torch.no_grad():
        output = _tensors(subject.network(*other.args, **other.kwargs))
    pairs = [pair for pair in zip(subject.output, output, strict=True) if pair[0].ndim and len(pair[0]) == size]
    if not pairs:
        return True, "not checked: the network returns nothing per sample"
    difference = _difference([expected[:1] for expected, _ in pairs], [found[:1] for _, found in pairs])
    return _finding(difference <= EXACT, f"the first sample changes by {difference:.1e}")


def _threads_do_not_mix(subject: _Subject) -> _Finding:
    network = subject.copy()
    inputs = [_changed(subject, lambda tensor, scale=scale: _scaled(tensor, scale)) for scale in (1.0, 0.5, -1.0)]  # type: ignore[misc]
    expected = [each.run(network) for each in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:  # three times each, in turn
        found = list(pool.map(lambda each: each.run(network), inputs * 3))
    differences = [_difference(*pair) for pair in zip(expected * 3, found, strict=True)]
    return _finding(all(difference <= EXACT for difference in differences), f"differs by {max(differences):.1e}")


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor * scale if tensor.is_floating_point() else tensor


def _runs_in_bfloat16(subject: _Subject) -> _Finding:
    device = subject.output[0].device.type
    with torch.autocast(device, torch.bfloat16):
        output = subject.run(subject.network)
    difference = subject.difference([tensor.float() for tensor in output])
    return difference < 0.2, f"relative difference {difference:.1e}"


def _runs_channels_last(subject: _Subject) -> _Finding:
    if any(parameter.ndim == 5 for parameter in subject.network.parameters()):
        return True, "not checked: the network has volumes"
    network = subject.copy().to(memory_format=torch.channels_last)
    other = _changed(
        subject, lambda tensor: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    )
    return _equal(subject, other.run(network))


def _converts_to_sync_batchnorm(subject: _Subject) -> _Finding:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(subject.copy())  # type: ignore[no-untyped-call]
    return _equal(subject, subject.run(network.eval()))


def _checkpoints(subject: _Subject) -> _Finding:
    expected = subject.gradients(subject.copy())
    network = subject.copy()
    with _blocks_checkpointed(network, reentrant=False):
        found = subject.gradients(network)
    pairs = [(ours, theirs) for ours, theirs in zip(expected, found, strict=True) if ours is not None]
    lost = sum(theirs is None for _, theirs in pairs)
    differences = [(ours - theirs).abs().max().item() for ours, theirs in pairs if theirs is not None]
    scale = max(ours.abs().max().item() for ours, _ in pairs)
    holds = lost == 0 and all(difference <= EXACT * scale for difference in differences)
    note = f"{lost} gradients are lost, others differ by up to {max(differences):.1e}: checkpoint whole stages"
    return _finding(holds, note)


def _refuses_reentrant_checkpoints(subject: _Subject) -> _Finding:
    expected = subject.gradients(subject.copy())
    network = subject.copy()
    try:
        with _blocks_checkpointed(network, reentrant=True):
            found = subject.gradients(network)
    except RuntimeError as error:
        if "does not require grad" in str(error):
            return True, "not checked: no block is given a tensor that requires a gradient by position"
        if "use_reentrant=False" not in str(error):
            raise
        return True, "refused: use_reentrant=False"
    same = all(
        ours is None or (theirs is not None and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7))
        for ours, theirs in zip(expected, found, strict=True)
    )
    return same, "exact" if same else "gradients are wrong: use use_reentrant=False"


@contextmanager
def _blocks_checkpointed(network: nn.Module, *, reentrant: bool) -> Iterator[None]:
    blocks = [block for block in network.modules() if isinstance(block, AttachedBlock)]
    for block in blocks:
        block.forward = _checkpointed(block.forward, reentrant)  # type: ignore[method-assign]
    yield
    for block in blocks:
        del block.forward


def _checkpointed(forward: Callable[..., Any], reentrant: bool) -> Callable[..., Any]:
    if reentrant:
        # Reentrant checkpoints take only positional arguments.
        return lambda *args, **kwargs: checkpoint(lambda *inner: forward(*inner, **kwargs), *args, use_reentrant=True)
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _exports(subject: _Subject) -> _Finding:
    with torch.no_grad():
        program = torch.export.export(subject.copy(), subject.args, subject.kwargs)
    return _equal(subject, subject.run(program.module()))


def _compiles(subject: _Subject) -> _Finding:
    plain = detach(subject.copy())
    torch.compile(plain)(*subject.args, **subject.kwargs)
    with torch.no_grad():
        output = _tensors(torch.compile(subject.copy())(*subject.args, **subject.kwargs))
    difference = subject.difference(output)
    return difference < 1e-3, f"relative difference {difference:.1e}"


_EXAMINATIONS: dict[str, Callable[[_Subject], _Finding]] = {
    "every site runs": _every_site_runs,
    "every parameter of the attention gets a gradient": _parameters_train,
    "no state is left after a forward": _nothing_is_left,
    "deepcopy": _copies_are_independent,
    "pickle": _pickles,
    "EMA copy": _averages,
    "state_dict round trip": _weights_survive,
    "safetensors": _saves_as_safetensors,
    "weights of the plain network fit": _plain_weights_fit,
    "earlier forwards do not matter": _history_does_not_matter,
    "batch mates do not matter": _batch_mates_do_not_matter,
    "threads do not mix": _threads_do_not_mix,
    "bfloat16 autocast": _runs_in_bfloat16,
    "channels_last": _runs_channels_last,
    "SyncBatchNorm conversion": _converts_to_sync_batchnorm,
    "checkpointing of blocks, non-reentrant": _checkpoints,
    "checkpointing of blocks, reentrant": _refuses_reentrant_checkpoints,
    "torch.export": _exports,
}


#: Checks that depend on more than attention: if one fails, the plain network is checked too.
_OF_THE_NETWORK = {
    "pickle",
    "EMA copy",
    "safetensors",
    "earlier forwards do not matter",
    "batch mates do not matter",
    "threads do not mix",
    "bfloat16 autocast",
    "channels_last",
    "SyncBatchNorm conversion",
    "torch.export",
}


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a nested output; output classes of other libraries are mappings or have attributes."""
    if not isinstance(value, Tensor) and not isinstance(value, Mapping | tuple | list) and hasattr(value, "__dict__"):
        value = vars(value)
    leaves = pytree.tree_leaves(dict(value) if isinstance(value, Mapping) else value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference relative to the largest entry; NaN if there is any."""
    ratios = [
        (ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12)
        for ours, theirs in zip(expected, found, strict=True)
    ]
    return torch.stack([ratio.double() for ratio in ratios]).max().item()  # unlike Python's max, this keeps NaN


def _changed(subject: _Subject, change: Callable[[Tensor], Tensor]) -> _Subject:
    """Return the same network with another input."""
    other = copy.copy(subject)
    other.args, other.kwargs = pytree.tree_map_only(Tensor, change, (subject.args, subject.kwargs))
    return other
