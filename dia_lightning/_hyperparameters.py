"""Hyperparameters that any checkpoint can hold, and which of them may be restored from one.

The author of a file chose its contents: values from files are data, and nothing in them may be imported or called.
"""

import inspect
import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

#: Marks a hyperparameter that was an object and cannot be kept in a checkpoint.
OBJECT = "object:"
#: Replaces a secret in everything that is written.
MASK = "***"
#: How Lightning and jsonargparse recognize a dictionary that stands for an object; either may also read it from text.
_CODE = ("class_path", "init_args", "dict_kwargs", "_instantiator")
#: More levels or values than these are not options but a list that contains itself, or an attempt to fill the memory.
_MOST_LEVELS, _MOST_VALUES = 20, 100_000


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
    """Return a copy made of what ``torch.load(weights_only=True)`` accepts, or the mark."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Real):  # numpy numbers would not load
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, list | tuple):
        return [primitive(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): primitive(item) for key, item in value.items()}
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{OBJECT}{name}"


def from_file(found: object, source: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Split hyperparameters from a file into plain data and the rest.

    Plain data is ``None``, booleans, numbers, strings, and lists and dictionaries of these that name no code at any
    depth.

    Args:
        found: the hyperparameters in the file.
        source: the file, for messages.

    Returns:
        Plain values by name; and by name, what is wrong with each of the others. Names that begin with ``_`` are
        Lightning's own, which would run what they name, and are in neither.

    Raises:
        ValueError: if it is not a dictionary of names.
    """
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(
            f"{source} is not a checkpoint of a task: its hyper_parameters must be a dictionary of names, got "
            f"{found!r:.100}. Give another file, or only its weights to init_from."
        )
    own = {name: value for name, value in found.items() if not name.startswith("_")}
    strange = {name: wrong for name, value in own.items() if (wrong := _strange_in(value)) is not None}
    return {name: value for name, value in own.items() if name not in strange}, strange


def arguments_of(kind: type, found: object, given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the constructor arguments in a file, followed by those given to override them.

    Args:
        kind: the class to build.
        found: the hyperparameters in the file.
        given: arguments by name.
        source: the file, for messages.

    Raises:
        ValueError: if one is not plain data and not given.
    """
    plain, strange = from_file(found, source)
    for name, what in strange.items():
        if name not in given:
            raise ValueError(
                f"{source} holds {what} as {name}, and checkpoints are data: no class is imported and nothing is "
                f"called because a file says so. Pass what you trust: load_from_checkpoint(path, {name}=...)."
            )
    known = inspect.signature(kind).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in known.values())
    return {**{name: value for name, value in plain.items() if takes_all or name in known}, **given}


def _strange_in(value: Any) -> str | None:
    """Return what in a value is not plain data; ``None`` if all is."""
    pending, count = [(value, 0)], 0
    while pending:
        item, level = pending.pop()
        count += 1
        if level > _MOST_LEVELS or count > _MOST_VALUES:
            return f"more than {_MOST_LEVELS} levels or {_MOST_VALUES} values"
        if isinstance(item, str):
            # a string with escapes may spell a word differently
            if any(word in item for word in _CODE) or ('"' in item and "\\" in item):
                return f"the text {item[:60]!r}"
            if MASK in item:
                return f"{item[:60]!r}, where a secret was,"
        elif isinstance(item, Mapping):
            pending += [(part, level + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            pending += [(part, level + 1) for part in item]
        elif not (item is None or isinstance(item, bool | int | float)):
            return f"a {type(item).__name__}"
    return None
