"""Names given by users, compared with the known ones."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that an option has one of the allowed values.

    Args:
        name: of the option, for the message.
        value: as given by the user.
        choices: the allowed values.

    Raises:
        ValueError: if it is not one of them.

    Example:
        >>> check_choice("share", "blok", ("stage", "block"))
        Traceback (most recent call last):
        ...
        ValueError: share must be one of stage, block, got 'blok'. Did you mean 'block'?
    """
    if value not in list(choices):  # not a dict, which does not accept unhashable values
        hint = did_you_mean(near(value, choices)) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known ones, or all of them if they are few."""
    names = sorted(set(known))
    hint = did_you_mean(near(name, names))
    return f".{hint}" if hint or not 0 < len(names) <= 20 else f". Known: {', '.join(names)}."


def near(name: str, known: Iterable[str], *, likeness: float = 0.6) -> list[str]:
    """Return up to three names that the user may have meant, nearest first, ignoring case.

    Args:
        name: as given.
        known: all known names.
        likeness: minimum likeness, in 0..1; lower for short names, which a user may have cut.
    """
    folded = {other.lower(): other for other in known}
    return [folded[match] for match in get_close_matches(name.lower(), folded, cutoff=likeness)]


def did_you_mean(names: Iterable[str]) -> str:
    """Return a question that names them, with a leading space; empty if there are none."""
    question = " or ".join(f"'{name}'" for name in names)
    return question and f" Did you mean {question}?"
