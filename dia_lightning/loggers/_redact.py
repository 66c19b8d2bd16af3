"""Configs without secrets."""

import re
from typing import Any

_SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)
_NEVER_A_NUMBER = re.compile(r"secret|password", re.IGNORECASE)  # unlike max_tokens


def redact(value: Any, kinds: tuple[type, ...] = ()) -> Any:
    """Return the same config with every text below a key such as ``api_key``, ``token`` or ``password`` replaced.

    Args:
        value: the config, or a part of it.
        kinds: what is replaced in any case.

    Example:
        >>> redact({"wandb": {"api_key": "abc", "project": "dia"}, "password": 1234})
        {'wandb': {'api_key': '***', 'project': 'dia'}, 'password': '***'}
    """
    if isinstance(value, dict):
        return {key: redact(item, kinds + _kinds_below(str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, kinds) for item in value]
    return "***" if isinstance(value, kinds) else value


def _kinds_below(key: str) -> tuple[type, ...]:
    if _NEVER_A_NUMBER.search(key):
        return (str, int, float)
    return (str,) if _SECRET.search(key) else ()
