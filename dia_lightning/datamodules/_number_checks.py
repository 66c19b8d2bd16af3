"""Check numbers that users give as options."""

import math
from numbers import Integral, Real
from typing import Any


def check_whole(name: str, value: Any, *, least: int, most: int | None = None, optional: bool = False) -> None:
    """Check an option that is a count.

    Args:
        name: of the option, for the message.
        value: as the user gave it.
        least: smallest value that makes sense.
        most: largest value that makes sense; ``None`` if there is no limit.
        optional: whether ``None`` is allowed too.

    Raises:
        ValueError: if it is of the wrong type, too small or too large.
    """
    if optional and value is None:
        return
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if most is not None and not (whole and least <= int(value) <= most):
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}.")
    if not whole or int(value) < least:
        raise ValueError(f"{name} must be a whole number of {least} or more{_none(optional)}, got {value!r}.")


def check_positive_or_zero(name: str, value: Any) -> None:
    """Check an option that is a finite number of 0 or more.

    Raises:
        ValueError: if it is not.
    """
    if not _is_number(value) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number of 0 or more, got {value!r}.")


def check_val_split(value: Any) -> None:
    """Check a number of samples or a fraction; 1.0 could be meant as either.

    Raises:
        ValueError: if it is neither a whole number of 0 or more nor a fraction below 1.
    """
    whole = isinstance(value, Integral)
    if not _is_number(value) or not (value >= 0 if whole else 0 <= value < 1):
        raise ValueError(
            f"val_split must be a number of samples (0, 1, 2, ...) or a fraction below 1 (such as 0.1), got {value!r}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _none(optional: bool) -> str:
    return ", or None" if optional else ""
