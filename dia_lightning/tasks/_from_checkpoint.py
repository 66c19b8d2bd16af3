"""Tasks from checkpoints: plain values go to the constructor unchanged, without a parser."""

from collections.abc import Mapping
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from torch import Tensor

from dia_lightning._checkpoint_kind import WrongCheckpointError, misfit
from dia_lightning._hyperparameters import OBJECT, arguments_of, from_file
from dia_lightning.models.libraries import is_elsewhere, without_weights
from dia_lightning.tasks.options import TakesOptions

Task = TypeVar("Task", bound=LightningModule)
#: Needed only to continue training: a task is built without them, and asks for them then.
_OF_TRAINING = ("optimizer", "schedule")


def build(
    kind: type[Task],
    checkpoint: Mapping[str, Any],
    given: Mapping[str, Any],
    source: str,
    *,
    strict: bool | None = None,
) -> Task:
    """Build the task of a checkpoint and load its weights.

    Args:
        kind: the class.
        checkpoint: the contents of the file.
        given: arguments that override those in the checkpoint.
        source: the file, for messages.
        strict: whether the weights must match the task's exactly; ``None`` for the task's own setting.

    Raises:
        ValueError: if a hyperparameter is not plain data and not given, or the weights do not match the task.
    """
    weights = checkpoint["state_dict"]
    found = _loadable(checkpoint["hyper_parameters"], source)
    backbone = found.get("backbone")
    if is_elsewhere(backbone) and "backbone" not in given:
        raise ValueError(
            f"{source} names {backbone} as backbone, which is read from elsewhere; nothing is read just because a file "
            f"says so. If you trust it, pass it: backbone={backbone!r}."
        )
    if issubclass(kind, TakesOptions) and kind.__signature__ is not None:  # the signature shows all options
        try:
            kind.refuse_unknown((name for name in found if not name.startswith("_")), kind.option_names())
        except ValueError as error:
            raise WrongCheckpointError(f"The hyper-parameters of {source} do not fit: {error}") from None
    arguments = arguments_of(kind, found, given, source)
    try:
        task = kind(**arguments)
    except (ValueError, ImportError):
        raise
    except Exception as error:  # values of other types fail in many ways
        written_by = checkpoint["dia_task"]
        raise WrongCheckpointError(
            f"The hyper-parameters of {source}, which {written_by} wrote, do not fit {kind.__name__}: {error}."
        ) from error
    task.configure_model()  # of a user's class
    task.on_load_checkpoint(dict(checkpoint))
    try:
        task.load_state_dict(weights, strict=task.strict_loading if strict is None else strict)
    except RuntimeError as error:
        raise WrongCheckpointError(
            f"The weights of {source} are not those of the network that its hyper-parameters describe "
            f"({misfit(str(error))}). Give the file as the run wrote it, or matching arguments: "
            "load_from_checkpoint(path, NAME=...)."
        ) from error
    first = next((value for value in weights.values() if isinstance(value, Tensor)), None)
    return task if first is None else task.to(first.device)


def _loadable(found: object, source: str) -> dict[str, Any]:
    """Return hyperparameters that build the same network and read no other file."""
    plain, strange = from_file(found, source)
    marks = {name: f"{OBJECT}{name}" for name in _OF_TRAINING if name in strange}
    loadable = {**dict(found), **marks}  # type: ignore[call-overload]  # from_file has looked
    loadable.pop("init_from", None)  # the checkpoint brings its own weights
    if isinstance(plain.get("backbone_args"), dict):
        loadable["backbone_args"] = without_weights(str(plain.get("backbone")), plain["backbone_args"])
    return loadable
