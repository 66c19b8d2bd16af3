"""What the program reports on stderr, from only one of several processes."""

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
    """Return options and their values for a message, sorted by name."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))
