"""Configs without secrets."""

import re
from typing import Any

_SECRET = re.compile(r"key|token|secret|passw|passphrase|credential", re.IGNORECASE)
_NEVER_A_NUMBER = re.compile(r"secret|passw|passphrase|credential", re.IGNORECASE)  # unlike max_tokens
_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")


def redact(value: Any, kinds: tuple[type, ...] = ()) -> Any:
    """Return the same config with every text below a key such as ``api_key``, ``token`` or ``password`` replaced.

    Of a URL, what stands before the host is replaced.

    Args:
        value: the config, or a part of it.
        kinds: what is replaced in any case.

    Example:
        >>> redact({"wandb": {"api_key": "abc", "project": "dia"}, "password": 1234})
        {'wandb': {'api_key': '***', 'project': 'dia'}, 'password': '***'}
        >>> redact({"mirror": "https://user:abc@host/x"})
        {'mirror': 'https://***@host/x'}
    """
    if isinstance(value, dict):
        return {key: redact(item, kinds + _kinds_below(str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, kinds) for item in value]
    if isinstance(value, kinds):
        return "***"
    return _IN_URL.sub("***@", value) if isinstance(value, str) else value


def _kinds_below(key: str) -> tuple[type, ...]:
    if _NEVER_A_NUMBER.search(key):
        return (str, int, float)
    return (str,) if _SECRET.search(key) else ()
