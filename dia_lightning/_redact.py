"""Configs, command lines and messages without secrets: what a run writes is made to be shown to others."""

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

MASK = "***"
#: Words that tell a secret wherever they are in a name; the second kind are no counts either, unlike max_tokens.
_ANYWHERE = re.compile(r"key|token|secret|passw|passphrase|credential|signature|bearer|cookie", re.IGNORECASE)
_NEVER_A_NUMBER = re.compile(r"secret|passw|passphrase|credential", re.IGNORECASE)
#: Words that other words contain: of a name's parts one must be equal to them.
_WHOLE_WORDS = frozenset(
    {"auth", "authorization", "dsn", "jwt", "pass", "pat", "pem", "pin", "pw", "pwd", "sas", "sig"}
)
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s?#\"']+@")
#: ``password=abc`` in the query of a URL, in the words of a database, or in a header.
_NAMED_IN_TEXT = re.compile(
    r"""(?P<name>[\w.-]+)(?P<sign>=|: ?(?:Bearer|Basic|Token) )(?:'[^']*'|"[^"]*"|[^&;,\s"']+)"""
)
#: What services give out, by its form; and keys as files.
_OF_A_SERVICE = re.compile(
    r"\b(?:hf_\w{20,}|gh[a-z]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)


def redact(value: Any, kinds: tuple[type, ...] = ()) -> Any:
    """Return the same config with every text below a key such as ``api_key``, ``token`` or ``password`` replaced.

    So is, in any text, the user of a URL, what is given as ``token=...``, and what has the form of a service's token.

    Args:
        value: the config, or a part of it.
        kinds: what is replaced in any case.

    Example:
        >>> redact({"wandb": {"api_key": "abc", "project": "dia"}, "password": 1234})
        {'wandb': {'api_key': '***', 'project': 'dia'}, 'password': '***'}
        >>> redact({"mirror": "https://user:abc@host/x?size=3&token=abc"})
        {'mirror': 'https://***@host/x?size=3&token=***'}
    """
    if isinstance(value, dict):
        return {key: redact(item, kinds + _kinds_below(str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, kinds) for item in value]
    if isinstance(value, kinds) and not isinstance(value, bool):
        return MASK
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return a text, of several lines or one, without what looks like a secret by itself.

    Example:
        >>> redact_text("cannot read s3://me:abc@bucket/x")
        'cannot read s3://***@bucket/x'
    """
    text = _OF_A_SERVICE.sub(MASK, _USER_IN_URL.sub(f"{MASK}@", text))
    return _NAMED_IN_TEXT.sub(_without_value, text)


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a program, each ``--name value`` or ``--name=value``, without secrets.

    Example:
        >>> redact_arguments(["fit", "--api_key", "abc", "--config={token: abc, size: 3}", "--lr=0.1"])
        ['fit', '--api_key', '***', '--config={"token": "***", "size": 3}', '--lr=0.1']
    """
    name, clean = "", []
    for argument in arguments:
        if argument.startswith("-"):
            name, sign, value = argument.partition("=")
            clean.append(f"{name}={_redact_argument(name, value)}" if sign else redact_text(name))
        else:
            clean.append(_redact_argument(name, argument))
    return clean


def _redact_argument(name: str, value: str) -> str:
    try:
        given = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError):  # no value of an option either
        return MASK if _ANYWHERE.search(f"{name} {value}") else redact_text(value)
    if not isinstance(given, dict | list):
        given = value if not isinstance(given, int | float) else given
    clean = redact({name: given})[name]
    if clean == given:
        return value
    return clean if isinstance(clean, str) else json.dumps(clean, default=str)


def _without_value(match: re.Match[str]) -> str:
    is_secret = _kinds_below(match["name"]) != ()
    return f"{match['name']}{match['sign']}{MASK}" if is_secret else match[0]


def _kinds_below(key: str) -> tuple[type, ...]:
    words = {word.lower() for word in _PARTS.findall(key)}
    if _NEVER_A_NUMBER.search(key) or words & _WHOLE_WORDS:
        return (str, int, float)
    return (str,) if _ANYWHERE.search(key) else ()
