"""Configs, command lines and messages without secrets: what a run writes is meant to be shared."""

import json
import re
from collections.abc import Sequence
from typing import Any

from dia_lightning._hyperparameters import MASK

#: Parts of a name that mark a secret, such as ``token`` and ``hftoken``. Numbers are counts, as in max_tokens.
_OF_A_SECRET = re.compile(r"\w*(?:key|token|signature|cookie)s?|bearer|auth|authorization|dsn|jwt|pat|pem|sas|sig")
#: These are also secret as an integer, and those after them anywhere in a name, as any number.
_OR_WHOLE_NUMBER = frozenset({"pass", "pin", "pw", "pwd"})
_OR_NUMBER = re.compile(r"secret|passw|passphrase|credential", re.IGNORECASE)
#: Last parts of names that are about a key, token or pass but not secret: ``token_mixers``, ``key_dim``, ``pw_ratio``.
_OF_SOMETHING_ELSE = re.compile(
    r"act|activation|bias|depth|device|dims?|drop|dropout|embed|filter|funcs?|heads?|init|kernel|layers?|mask|memory"
    r"|mixers?|mode|name|norm|only|pool|pooling|predictor|proj|ratio|scale|size|types?"
)
_OTHER_WORDS = frozenset({"donkey", "hockey", "jockey", "monkey", "turkey", "whiskey"})  # classes also have names
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s?#\"']+@")
#: ``password=abc`` in the query of a URL, in a database string, or in a header; folders also have such names.
_NAMED_IN_TEXT = re.compile(
    r"""(?<![\w./\\-])(?P<name>[\w.-]+)(?P<sign>=|: ?(?:Bearer|Basic|Token) )(?P<value>'[^']*'|"[^"]*"|[^&;,\s"']+)"""
)
_NUMBERS = {int: re.compile(r"-?\d+"), float: re.compile(r"-?\d*\.\d+(?:e-?\d+)?")}
#: Tokens issued by services, by their form; and key files.
_OF_A_SERVICE = re.compile(
    r"\b(?:(?:hf|gh[a-z])_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]*[A-Za-z0-9]{16,}[\w-]*"
    r"|xox[a-z]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)


def redact(value: Any, kinds: tuple[type, ...] = ()) -> Any:
    """Return the same config with every text below a key such as ``api_key``, ``token`` or ``password`` replaced.

    In any text, so are the user of a URL, the value of ``token=...``, and anything with the form of a service's token.

    Args:
        value: the config, or a part of it.
        kinds: what is always replaced.

    Example:
        >>> redact({"wandb": {"api_key": "abc", "project": "dia"}, "password": 1234})
        {'wandb': {'api_key': '***', 'project': 'dia'}, 'password': '***'}
        >>> redact({"mirror": "https://user:abc@host/x?size=3&token=abc"})
        {'mirror': 'https://***@host/x?size=3&token=***'}
    """
    if isinstance(value, dict):
        return {key: redact(item, kinds + _kinds_below(str(key))) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(redact(item, kinds) for item in value)
    if isinstance(value, kinds) and not isinstance(value, bool):
        return MASK
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return a text of one or several lines without anything that looks like a secret.

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
    import yaml  # of an extra; the program's messages do not need it

    try:
        given = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError):  # also not the value of an option
        return MASK if any(map(_kinds_below, re.findall(r"[\w-]+", f"{name} {value}"))) else redact_text(value)
    if not isinstance(given, dict | list):
        given = value if not isinstance(given, int | float) else given
    clean = redact({name: given})[name]
    if clean == given:
        return value
    return clean if isinstance(clean, str) else json.dumps(clean, default=str)


def _without_value(match: re.Match[str]) -> str:
    value = match["value"]
    kind = next((kind for kind, form in _NUMBERS.items() if form.fullmatch(value)), str)
    return f"{match['name']}{match['sign']}{MASK}" if kind in _kinds_below(match["name"]) else match[0]


def _kinds_below(key: str) -> tuple[type, ...]:
    """Return the types for which a value below a key is a secret."""
    if _OR_NUMBER.search(key):
        return (str, int, float)
    words = [word.lower() for word in _PARTS.findall(key)]
    if not words or _OF_SOMETHING_ELSE.fullmatch(words[-1]):
        return ()
    if not _OR_WHOLE_NUMBER.isdisjoint(words):
        return (str, int)
    is_secret = any(_OF_A_SECRET.fullmatch(word) and word not in _OTHER_WORDS for word in words)
    return (str,) if is_secret else ()
