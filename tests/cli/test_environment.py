"""Programs without a terminal, and places and locales that do not take what is written."""

import copy
import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dia_lightning.cli._errors import is_for_the_user, message_of
from dia_lightning.cli.runs.version_folders import claim_versions


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


def test_loggers_of_one_run_share_its_folder(tmp_path: Path) -> None:
    loggers = [kind(str(tmp_path), name="digits") for kind in (CSVLogger, TensorBoardLogger)]
    claim_versions([*loggers])
    assert [logger.version for logger in loggers] == [0, 0]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_runs_that_start_in_the_same_instant_have_different_folders(
    kind: type[CSVLogger] | type[TensorBoardLogger], tmp_path: Path
) -> None:
    loggers = [kind(str(tmp_path), name="digits") for _ in range(8)]
    for logger in loggers:
        claim_versions([logger])
    start = Barrier(len(loggers))

    def version(logger: CSVLogger | TensorBoardLogger) -> int | str:
        start.wait()
        return logger.version

    with ThreadPoolExecutor(len(loggers)) as pool:
        assert sorted(pool.map(version, loggers)) == list(range(8))
    again = copy.deepcopy(loggers[0])
    assert again.version == loggers[0].version
    assert len(pickle.dumps(loggers[0])) > 0  # for processes that are started with a copy
    assert kind(str(tmp_path), name="digits", version=3).version == 3
