"""Loading tasks of any class from checkpoints, for the command line and shared folders."""

from pathlib import Path
from typing import Any

from dia_lightning._checkpoint_file import DamagedFileError, load
from dia_lightning._checkpoint_kind import WrongCheckpointError, check_is_of_task
from dia_lightning.tasks._from_checkpoint import build
from dia_lightning.tasks.base import DIATask


def load_task(path: str | Path) -> DIATask:
    """Load a trained task from a checkpoint of this package in evaluation mode, on the CPU and not compiled.

    Args:
        path: a ``.ckpt`` file written by a training run. No code is run from it.

    Returns:
        The task, of the class that wrote the checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a checkpoint of a task of this package, or names code to build it with.

    Example:
        >>> task = load_task("runs/digits/version_0/checkpoints/last.ckpt")  # doctest: +SKIP
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    if not Path(path).is_file():
        raise WrongCheckpointError(f"{path} is no file, but a {'folder' if Path(path).is_dir() else 'device'}.")
    try:
        checkpoint = load(path)
    except DamagedFileError as error:
        raise ValueError(
            f"{str(path)!r} is damaged or no checkpoint of dia-lightning ({error.reason}).{error.instead}"
        ) from error
    check_is_of_task(checkpoint, str(path))
    kind = task_named(checkpoint["dia_task"], str(path))
    # inspecting a network needs neither minutes of compiling nor a compiler
    compiled = checkpoint["hyper_parameters"].get("compile")
    options: dict[str, Any] = {"compile": False} if isinstance(compiled, bool | str) and compiled else {}
    return build(kind, checkpoint, options, str(path)).eval()


def task_named(name: str, source: str) -> type[DIATask]:
    """Return the class of the task that wrote a file.

    Raises:
        ValueError: if it is not imported.
    """
    known = {task.__name__: task for task in _subclasses(DIATask)}
    if name not in known:
        raise ValueError(f"{source!r} was written by {name}, which is not imported. Import it before loading.")
    return known[name]


def check_is_related(name: str, kind: type, source: str) -> None:
    """Refuse the checkpoint of another task; those of subclasses and base classes may match.

    Args:
        name: of the class that wrote it; nothing is known about one that is not imported.
        kind: the class that is to load it.
        source: the file, for the message.

    Raises:
        WrongCheckpointError: if neither class is derived from the other.
    """
    written_by = [task for task in _subclasses(DIATask) if task.__name__ == name]
    if written_by and not any(issubclass(kind, task) or issubclass(task, kind) for task in written_by):
        raise WrongCheckpointError(
            f"{source} is a checkpoint of {name}, but the task of this command is {kind.__name__}. Give a checkpoint "
            f"of that, or use the config of the run that wrote it."
        )


def _subclasses(base: type[DIATask]) -> list[type[DIATask]]:
    below = base.__subclasses__()
    return [*below, *(task for child in below for task in _subclasses(child))]
