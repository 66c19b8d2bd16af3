"""What somebody may have meant by an unknown name."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known ones, or all of them if they are few."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return ". Did you mean " + " or ".join(f"'{item}'" for item in close) + "?"
    if 0 < len(names) <= 20:
        return f". Known: {', '.join(names)}."
    return "."
