"""Parameters that are not trained."""

from collections.abc import Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import Tensor, nn

#: What ``freeze`` takes besides patterns.
ALL_BUT = "all-but-attention-and-head"
Freeze = list[str] | Literal["all-but-attention-and-head"] | None


def check_freeze(freeze: Any) -> None:
    """Check the type of the value when a task is created.

    Raises:
        ValueError: if it is neither a list of patterns nor the special name.
    """
    is_list = isinstance(freeze, list | tuple) and all(isinstance(item, str) for item in freeze)
    if freeze is not None and freeze != ALL_BUT and not is_list:
        raise ValueError(
            f"freeze must be a list of patterns such as ['backbone.layer1'], {ALL_BUT!r} or None, got {freeze!r}."
        )


def frozen_names(module: nn.Module, freeze: Sequence[str] | str, kept: Set[nn.Parameter]) -> set[str]:
    """Return the names of the parameters to freeze.

    Args:
        module: the module that has the parameters.
        freeze: patterns of parameters or modules, or the special name for all but ``kept``.
        kept: parameters of attention and the head.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    names = dict(module.named_parameters())
    if freeze == ALL_BUT:
        return {name for name, parameter in names.items() if parameter not in kept}
    found: set[str] = set()
    for pattern in freeze:
        chosen = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not chosen:
            raise ValueError(
                f"freeze has the pattern {pattern!r}, which matches no parameter. Parameter names look like "
                f"{', '.join(list(names)[:3])}."
            )
        found |= chosen
    return found


def freeze_parameters(module: nn.Module, names: Set[str]) -> list[str]:
    """Freeze parameters by name, and return the paths of norms whose statistics must not change.

    These are norms with all parameters frozen, and norms without parameters among frozen layers.
    """
    for name, parameter in module.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return [
        path for path, part in module.named_modules() if has_statistics(part) and _is_frozen(module, path, part, names)
    ]


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module is a norm that can track statistics of its inputs, like batch and instance norms."""
    return hasattr(module, "track_running_stats")


def _is_frozen(module: nn.Module, path: str, norm: nn.Module, names: Set[str]) -> bool:
    own = {f"{path}.{name}" for name, _ in norm.named_parameters(recurse=False)}
    if own or not path:
        return bool(own) and own <= names
    around = path.rpartition(".")[0]  # a norm without weights is frozen if its siblings are
    prefix = f"{around}." if around else ""
    beside = {f"{prefix}{name}" for name, _ in module.get_submodule(around).named_parameters()}
    return bool(beside) and beside <= names


def statistics_of(module: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the buffers of norms, by name."""
    return {
        f"{path}.{name}": buffer.clone()
        for path in paths
        for name, buffer in module.get_submodule(path).named_buffers(recurse=False)
    }


def put_back(module: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Undo changes of callbacks to the buffers of frozen norms, as ``StochasticWeightAveraging`` makes at its end."""
    for name, value in statistics.items():
        module.get_buffer(name).copy_(value)


def finetuning(trainer: Trainer) -> list[BaseFinetuning]:
    """Return the callbacks of a trainer that freeze and unfreeze parameters."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, BaseFinetuning)]


def keep_trained(module: nn.Module, callbacks: Iterable[BaseFinetuning], kept: Set[nn.Parameter]) -> None:
    """Train attention and head even though a finetuning callback has frozen the whole network they are part of.

    Args:
        module: the module whose ``backbone`` Lightning's ``BackboneFinetuning`` freezes.
        callbacks: those that have frozen something.
        kept: parameters of attention and the head.
    """
    norms = [part for part in module.modules() if has_statistics(part)]  # the callback may train these
    in_norms = {parameter for norm in norms for parameter in norm.parameters(recurse=False)}
    is_all_frozen = not any(each.requires_grad for each in module.parameters() if each not in in_norms)
    if is_all_frozen or any(isinstance(callback, BackboneFinetuning) for callback in callbacks):
        train_parameters(module, kept)


def train_parameters(module: nn.Module, parameters: Set[nn.Parameter]) -> None:
    """Undo what a finetuning callback does to parameters and their norms."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    for part in module.modules():
        if has_statistics(part) and not parameters.isdisjoint(part.parameters(recurse=False)):
            part.track_running_stats = True  # type: ignore[assignment]  # it is a boolean
