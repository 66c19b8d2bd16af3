"""Options that were given as null and take no null, which the parser lets through."""

import inspect
from collections.abc import Mapping
from typing import Any

from dia_lightning.cli._errors import UserError
from dia_lightning.cli.parsing.class_messages import imported


def refuse_null(option: str, class_path: str, given: Mapping[str, Any]) -> None:
    """Refuse ``null`` for what must have a value.

    Args:
        option: that the class was given to, ``"--model"``.
        class_path: the class.
        given: its options that were given, by name.

    Raises:
        UserError: if one of them is ``None`` and neither its default nor its type is.
    """
    bases = getattr(imported(class_path), "__mro__", ())
    for name in (name for name, value in given.items() if value is None):
        known = (inspect.signature(base.__init__).parameters.get(name) for base in bases if "__init__" in vars(base))
        parameter = next((item for item in known if item is not None), None)
        if parameter is None or parameter.default in (None, parameter.empty):
            continue
        if "None" not in str(parameter.annotation) and "Optional" not in str(parameter.annotation):
            raise UserError(
                f"{option}.{name}: null does not fit. Give a value, or leave it out for the default, "
                f"{parameter.default!r}."
            )
