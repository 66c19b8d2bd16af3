"""Names that users give, compared with those there are."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check an option that is one of some words.

    Args:
        name: of the option, for the message.
        value: as the user gave it.
        choices: all there are.

    Raises:
        ValueError: if it is none of them.

    Example:
        >>> check_choice("share", "blok", ("stage", "block"))
        Traceback (most recent call last):
        ...
        ValueError: share must be one of stage, block, got 'blok'. Did you mean 'block'?
    """
    if value not in list(choices):  # not a dict, which takes no unhashable value
        hint = did_you_mean(near(value, choices)) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known ones, or all of them if they are few."""
    names = sorted(set(known))
    hint = did_you_mean(near(name, names))
    return f".{hint}" if hint or not 0 < len(names) <= 20 else f". Known: {', '.join(names)}."


def near(name: str, known: Iterable[str], *, likeness: float = 0.6) -> list[str]:
    """Return up to three names that somebody may have meant, the nearest first, whatever their letter case.

    Args:
        name: as it was given.
        known: all there are.
        likeness: the least, in 0..1; lower for short names, which a user may have cut.
    """
    folded = {other.lower(): other for other in known}
    return [folded[match] for match in get_close_matches(name.lower(), folded, cutoff=likeness)]


def did_you_mean(names: Iterable[str]) -> str:
    """Return the question that names them, with a blank before it; nothing if there are none."""
    question = " or ".join(f"'{name}'" for name in names)
    return question and f" Did you mean {question}?"
