"""How the program reports a user's mistake: one line and exit code 2, no stack trace."""

import errno
import os
import sys
from typing import NoReturn

from dia_lightning._redact import redact_text

PROGRAM = "dia-lightning"
#: Errors of a full or write-protected disk or folder, or of a file where a folder should be.
_OF_THE_DISK = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "ENAMETOOLONG")


class UserError(Exception):
    """A mistake that the user can fix; its text is the one line to show."""


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line to stderr and exit, with code 2 for mistakes of the user."""
    sys.stderr.write(f"{PROGRAM}: error: {redact_text(' '.join(message.split()))}\n")
    raise SystemExit(code)


def is_for_the_user(error: BaseException) -> bool:
    """Return whether an error's text is enough: the command line or this package raised it on purpose."""
    if os.environ.get("DIA_TRACEBACK") == "1":
        return False
    if isinstance(error, UnicodeEncodeError):
        return True
    kind = type(error)
    if kind.__module__.startswith("dia_lightning") or kind.__name__ == "MisconfigurationException":
        return True
    return isinstance(error, (ValueError, OSError, ImportError)) and (is_ours(error) or _is_of_the_disk(error))


def message_of(error: BaseException) -> str:
    """Return an error's own message; an error from a loader's process has a trace before it."""
    text = str(error)
    if isinstance(error, UnicodeEncodeError):
        text = f"{error.object!a:.200} cannot be written in this locale ({error.encoding}). Set PYTHONUTF8=1."
    if isinstance(error, OSError) and _is_of_the_disk(error):
        place = "" if error.filename is None else f": {error.filename}"
        text = f"{error.strerror}{place}. Make room, or give a folder that can be written to."
    return text.rpartition(f"{type(error).__name__}: ")[2] if "Original Traceback" in text else text


def _is_of_the_disk(error: BaseException) -> bool:
    """Return whether a disk or folder refused something, wherever that happened."""
    return isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _OF_THE_DISK


def is_ours(error: BaseException) -> bool:
    """Return whether an error was raised in a line of this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("dia_lightning")
