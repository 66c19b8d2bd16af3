"""Values that the parser lets through: null where it is not allowed, and numbers that the Trainer cannot use."""

import inspect
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from jsonargparse import Namespace

from dia_lightning.cli._errors import UserError
from dia_lightning.cli.parsing.class_messages import imported


class _Limit(NamedTuple):
    least: float
    expected: str
    is_in: bool = True  # whether the least value itself is allowed


_LIMITS = {
    "accumulate_grad_batches": _Limit(1, "1 or more batches per step"),
    "check_val_every_n_epoch": _Limit(1, "1 or more epochs, or null to count batches alone"),
    "gradient_clip_val": _Limit(0, "0 or more, where 0 does not clip"),
    "log_every_n_steps": _Limit(0, "0 or more steps, where 0 logs nothing"),
    "min_epochs": _Limit(0, "0 or more"),
    "min_steps": _Limit(0, "0 or more"),
    "num_sanity_val_steps": _Limit(-1, "0 or more batches, or -1 for all"),
    "val_check_interval": _Limit(0, "1 or more batches, or a part of an epoch above 0.0", is_in=False),
}
_LARGEST_SEED = 2**32 - 1  # numpy's


def check_limits(config: Namespace) -> None:
    """Refuse numbers out of range before anything is built.

    Args:
        config: of one command.

    Raises:
        UserError: if one is.
    """
    for name, limit in _LIMITS.items():
        value = config.trainer.get(name)
        if isinstance(value, int | float) and not (value >= limit.least if limit.is_in else value > limit.least):
            _refuse(f"trainer.{name}", value, limit.expected)
    if _is_negative_time(config.trainer.get("max_time")):
        _refuse("trainer.max_time", config.trainer.max_time, "a time above zero, such as 00:08:00:00 for eight hours")
    seed = config.get("seed_everything")
    if seed is not None and not 0 <= seed <= _LARGEST_SEED:
        _refuse("seed_everything", seed, f"a whole number in 0..{_LARGEST_SEED}, or false for none")


def _is_negative_time(value: Any) -> bool:
    parts = value.as_dict() if isinstance(value, Namespace) else value
    if isinstance(parts, dict):
        return timedelta(**{name: part or 0 for name, part in parts.items()}) <= timedelta()
    return isinstance(value, timedelta) and value <= timedelta()


def _refuse(name: str, value: Any, expected: str) -> None:
    raise UserError(f"--{name} {value}: expected {expected}.")


def refuse_null(option: str, class_path: str, given: Mapping[str, Any]) -> None:
    """Refuse ``null`` for options that need a value.

    Args:
        option: the one that the class was given to, ``"--model"``.
        class_path: the class.
        given: its options that were given, by name.

    Raises:
        UserError: if one of them is ``None``, and neither its default is ``None`` nor its type allows it.
    """
    bases = getattr(imported(class_path), "__mro__", ())
    for name in (name for name, value in given.items() if value is None):
        known = (inspect.signature(base).parameters.get(name) for base in bases if "__init__" in vars(base))
        parameter = next((item for item in known if item is not None), None)
        if parameter is None or parameter.default in (None, parameter.empty):
            continue
        if "None" not in str(parameter.annotation) and "Optional" not in str(parameter.annotation):
            raise UserError(
                f"{option}.{name}: null does not fit. Give a value, or leave it out for the default, "
                f"{parameter.default!r}."
            )
