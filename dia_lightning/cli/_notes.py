"""What the program says about what it does, on stderr, in one process of several."""

import sys
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from dia_lightning._redact import redact_text
from dia_lightning.cli._errors import PROGRAM


@rank_zero_only
def say(message: str) -> None:
    """Print a line."""
    print(f"{PROGRAM}: {redact_text(message)}", file=sys.stderr)


def listing(values: dict[str, Any]) -> str:
    """Return options and their values for a line, in the order of their names."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))
