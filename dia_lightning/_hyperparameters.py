"""Hyperparameters that every checkpoint can hold."""

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

#: Marks a hyperparameter that was an object and cannot be kept in a checkpoint.
OBJECT = "object:"


def check_is_no_mark(name: str, value: Any) -> None:
    """Refuse the mark that stands for an object in a checkpoint.

    Raises:
        ValueError: if the value is such a mark.
    """
    if isinstance(value, str) and value.startswith(OBJECT):
        raise ValueError(
            f"The checkpoint was trained with an object as {name} ({value.removeprefix(OBJECT)}), which no "
            f"checkpoint can hold. Pass it again: load_from_checkpoint(path, {name}=...)."
        )


def primitive(value: Any) -> Any:
    """Return a copy made of what ``torch.load(weights_only=True)`` accepts, or a mark."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Real):  # numbers of numpy would not load
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, list | tuple):
        return [primitive(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): primitive(item) for key, item in value.items()}
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{OBJECT}{name}"
