"""Programs without a terminal, and places and locales that do not take what is written."""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from dia_lightning.cli._errors import is_for_the_user, message_of


@pytest.mark.parametrize(("command", "code"), [(["--version"], 0), (["fitt"], 2), ([], 2)])
@pytest.mark.skipif(os.name == "nt", reason="numbers of streams")
def test_closed_streams_are_no_error(command: Sequence[str], code: int) -> None:
    closing = f"exec {sys.executable} -m dia_lightning {' '.join(command)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", closing]).returncode == code


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.EEXIST, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG])
def test_what_a_folder_refuses_is_one_line(number: int) -> None:
    error = OSError(number, os.strerror(number), "runs/digits")
    assert is_for_the_user(error)
    assert message_of(error).startswith(f"{os.strerror(number)}: runs/digits. ")


def test_what_the_locale_cannot_write_is_one_line() -> None:
    with pytest.raises(UnicodeEncodeError) as failed:
        "größe".encode("ascii")
    assert is_for_the_user(failed.value)
    assert message_of(failed.value) == ("'gr\\xf6\\xdfe' cannot be written in this locale (ascii). Set PYTHONUTF8=1.")
