"""Tasks from checkpoints, whatever class they are of."""

from pathlib import Path
from typing import Any

from dia_lightning._checkpoint_file import DamagedFileError, load
from dia_lightning.tasks._from_checkpoint import build
from dia_lightning.tasks.base import DIATask


def load_task(path: str | Path) -> DIATask:
    """Load a trained task from a checkpoint of this package, in evaluation mode, on the CPU and not compiled.

    Args:
        path: a ``.ckpt`` file that a training run wrote. No code is run from it.

    Returns:
        The task, of the class that wrote the checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint of a task of this package, or names code to build it with.

    Example:
        >>> task = load_task("runs/digits/version_0/checkpoints/last.ckpt")  # doctest: +SKIP
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    try:
        checkpoint = load(path)
        name = checkpoint["dia_task"]
    except Exception as error:  # a file that is none of ours fails in many ways
        reason, instead = type(error).__name__, ""
        if isinstance(error, DamagedFileError):
            reason, instead = error.reason, error.instead
        raise ValueError(f"{str(path)!r} is damaged or no checkpoint of dia-lightning ({reason}).{instead}") from error
    kind = task_named(name, str(path))
    # to look at a network, minutes of compiling and a compiler are not needed
    found = checkpoint.get("hyper_parameters")
    options: dict[str, Any] = {"compile": False} if isinstance(found, dict) and found.get("compile") else {}
    return build(kind, checkpoint, options, str(path)).eval()


def task_named(name: str, source: str) -> type[DIATask]:
    """Return the class of a task that wrote a file.

    Raises:
        ValueError: if it is not imported.
    """
    known = {task.__name__: task for task in _subclasses(DIATask)}
    if name not in known:
        raise ValueError(f"{source!r} was written by {name}, which is not imported. Import it before loading.")
    return known[name]


def _subclasses(base: type[DIATask]) -> list[type[DIATask]]:
    below = base.__subclasses__()
    return [*below, *(task for child in below for task in _subclasses(child))]
