"""What a command reads from a checkpoint: plain values, which import nothing."""

from collections.abc import Mapping
from typing import Any

from dia_lightning._checkpoint_file import load
from dia_lightning._checkpoint_kind import WrongCheckpointError, check_is_of_task
from dia_lightning._hyperparameters import from_file
from dia_lightning.cli.parsing.own_classes import CLASS_PATH
from dia_lightning.models.libraries import is_elsewhere, without_weights

# num_classes and image_shape come from the data, and the checkpoint's weights replace those of init_from.
NOT_TAKEN = frozenset({"num_classes", "image_shape", "init_from"})
# Options with dotted names of weights and layers, which take no objects.
_OF_NAMES = frozenset({"backbone_args", "freeze", "sites"})


def read_checkpoint(path: str) -> dict[str, Any]:
    """Load a checkpoint without running code in it.

    Raises:
        ValueError: if the file is damaged or not written by a task.
    """
    checkpoint = load(path)
    check_is_of_task(checkpoint, path)
    return checkpoint  # type: ignore[no-any-return]


def check_is_of_run(checkpoint: Mapping[str, Any], path: str, command: str) -> None:
    """Refuse a file on which Lightning would fail without naming it.

    Args:
        checkpoint: what :func:`read_checkpoint` gave.
        path: the file, for the message.
        command: the command that will load it.

    Raises:
        WrongCheckpointError: if no training run of this package wrote it.
    """
    check_is_of_task(checkpoint, path)
    loop = f"{command}_loop"
    expected: dict[str, type] = {"pytorch-lightning_version": str}
    expected |= {"epoch": int, "global_step": int, "loops": dict} if command == "fit" else {}
    expected |= {"optimizer_states": list, "lr_schedulers": list} if command == "fit" else {}
    wrong = [name for name, kind in expected.items() if not isinstance(checkpoint.get(name), kind)]
    loops = checkpoint.get("loops")
    if loops is not None and not (isinstance(loops, dict) and isinstance(loops.get(loop), dict)):
        wrong.append(f"loops.{loop}")
    wrong += [name for name in ("callbacks", "dia_run") if not isinstance(checkpoint.get(name, {}), dict)]
    if wrong:
        raise WrongCheckpointError(
            f"{path} is no checkpoint of a training run that {command} can load: {', '.join(wrong)} is missing or of "
            f"another kind{_without_training(checkpoint)}. Give a .ckpt that fit wrote; of other files "
            "--model.init_from takes the weights."
        )


def _without_training(checkpoint: Mapping[str, Any]) -> str:
    is_without = "optimizer_states" not in checkpoint and "pytorch-lightning_version" in checkpoint
    return ", as after save_weights_only" if is_without else ""


def hyper_parameters(checkpoint: Mapping[str, Any], class_path: str, path: str) -> tuple[dict[str, Any], list[str]]:
    """Return the hyper-parameters that may be taken from a checkpoint: plain values of the class being built.

    Class paths in a checkpoint are never imported: the author of the file would choose which code runs here.

    Args:
        checkpoint: what :func:`read_checkpoint` gave.
        class_path: the class that the command or its config names.
        path: the checkpoint, for messages.

    Returns:
        Values by name, and the names of options with other values; nothing for a checkpoint of another class.

    Raises:
        ValueError: if the hyper-parameters are not a dictionary.
    """
    found = checkpoint.get("hyper_parameters", {})
    plain, strange = from_file(found, path)
    written_by = str(found.get("_class_path", class_path))
    if written_by.rpartition(".")[2] != class_path.rpartition(".")[2]:
        return {}, []
    taken = {
        name: value
        for name, value in plain.items()
        if name not in NOT_TAKEN and (name in _OF_NAMES or not _has_class_path(value))
    }
    if is_elsewhere(taken.get("backbone")):
        strange["backbone"] = taken.pop("backbone")
    return without_files(taken, plain), sorted(strange)


def without_files(options: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that build the same network without reading weights; a checkpoint has its own.

    Args:
        options: by name.
        others: has the backbone if the options do not.
    """
    args, backbone = options.get("backbone_args"), options.get("backbone", others.get("backbone"))
    own = {"backbone_args": without_weights(str(backbone), args)} if isinstance(args, dict) else {}
    return {**options, **own}


def class_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Return the class names that a checkpoint was trained on, if it knows them."""
    names = checkpoint.get("dia_data", {}).get("class_names")
    return None if names is None else [str(name) for name in names]


def _has_class_path(value: Any) -> bool:
    """Return whether a string in a value could be a path such as "package.Class".

    The config of a run keeps what the run took from a checkpoint. If an option also takes an object, the next command
    that reads that config would import such a string.
    """
    if isinstance(value, str):
        return CLASS_PATH.fullmatch(value) is not None
    if isinstance(value, (list, tuple)):
        return any(map(_has_class_path, value))
    return isinstance(value, dict) and any(map(_has_class_path, value.values()))
