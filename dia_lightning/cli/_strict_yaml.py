"""YAML as everywhere else in the command line, minus two silent faults: duplicate keys and not-a-number."""

import math
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "strict-yaml"


class StrictYAMLError(yaml.YAMLError):
    """Text that is YAML, but holds a fault."""


def load(text: str, path: str = "") -> Any:
    """Read YAML; refuse a key that is given twice and a value that is not a number.

    Args:
        text: a whole document or the value of one option.
        path: the file it is from, for messages.

    Returns:
        The values, as jsonargparse's YAML loader gives them.

    Raises:
        yaml.YAMLError: if the text is not YAML; as :class:`StrictYAMLError` if it holds duplicate keys or ``.nan``.

    Example:
        >>> load("lr: 1e-1")
        {'lr': 0.1}
    """
    place = f"{path}: " if path else ""
    _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), place)
    value = get_loader("yaml")(text)
    _refuse_nan(value, f"{place}value")
    return value


def install() -> str:
    """Make the loader known to jsonargparse; return the name to give as ``parser_mode``."""
    set_loader(MODE, load, exceptions=(yaml.YAMLError,))
    return MODE


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
