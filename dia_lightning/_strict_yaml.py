"""YAML as the command line reads it, minus three silent faults: duplicate keys, not-a-number and ``None``."""

import math
from collections.abc import Iterator
from typing import Any

import yaml
from jsonargparse import get_loader

_MOST_NODES = 1_000_000


class StrictYAMLError(yaml.YAMLError):
    """The text is YAML but has a fault."""


def load(text: str, path: str = "") -> Any:
    """Read YAML, refusing duplicate keys and not-a-number values, and reading ``None`` as ``null``.

    Python programs write ``None``, for example the agent of a W&B sweep; the string is ``"None"``, in quotes.

    Args:
        text: a whole document or the value of one option.
        path: the source file, for messages.

    Returns:
        The values, as jsonargparse's YAML loader gives them.

    Raises:
        yaml.YAMLError: if the text is not YAML; as :class:`StrictYAMLError` if it holds duplicate keys or ``.nan``.

    Example:
        >>> load("lr: 1e-1")
        {'lr': 0.1}
    """
    place = f"{path}: " if path else ""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    _refuse_bombs(document, place)
    _refuse_duplicates(document, place)
    for start, end in sorted(_nones(document), reverse=True):
        text = f"{text[:start]}null{text[end:]}"
    value = get_loader("yaml")(text)
    _refuse_nan(value, f"{place}value")
    return value


def _nones(node: yaml.Node | None) -> Iterator[tuple[int, int]]:
    """Yield where unquoted ``None`` values begin and end in the text, except keys."""
    if isinstance(node, yaml.ScalarNode) and node.value == "None" and node.style is None:
        yield node.start_mark.index, node.end_mark.index
    elif isinstance(node, yaml.CollectionNode):
        for item in node.value:
            yield from _nones(item[1] if isinstance(node, yaml.MappingNode) else item)


def _refuse_bombs(document: yaml.Node | None, place: str) -> None:
    """Refuse aliases that contain themselves, or that expand a short text into an endless document."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_NODES  # while it is counted: meeting it again means being inside it
            items = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(map(size, items))
        return sizes[id(node)]

    try:
        fits = document is None or size(document) < _MOST_NODES
    except RecursionError:
        fits = False
    if not fits:
        raise StrictYAMLError(
            f"{place}its aliases (*name) hold themselves or make more than {_MOST_NODES} values. Write them out."
        )


def _refuse_duplicates(node: yaml.Node | None, place: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, place)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise StrictYAMLError(
                    f"{place}{key.value} is given twice, in lines {lines[key.value]} and {line}. Keep one."
                )
            lines[key.value] = line
            _refuse_duplicates(item, place)


def _refuse_nan(value: Any, name: str) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise StrictYAMLError(f"{name} must be a finite number, got .nan.")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_nan(item, str(key))
    elif isinstance(value, list):
        for item in value:
            _refuse_nan(item, name)
