"""Configs without secrets."""

import re
from typing import Any

_SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


def redact(value: Any, secret: bool = False) -> Any:
    """Return the same config with every text below a key such as ``api_key``, ``token`` or ``password`` replaced.

    Example:
        >>> redact({"wandb": {"api_key": "abc", "project": "dia"}})
        {'wandb': {'api_key': '***', 'project': 'dia'}}
    """
    if isinstance(value, dict):
        return {key: redact(item, secret or _SECRET.search(str(key)) is not None) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item, secret) for item in value]
    return "***" if secret and isinstance(value, str) else value
