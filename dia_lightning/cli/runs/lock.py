"""Only one training at a time writes to the folder of a run."""

import os
from pathlib import Path
from typing import BinaryIO

from dia_lightning.cli.runs.run_of_checkpoint import CONFIG, is_same

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """A lock on the config of a run, which the system releases when the process ends in any way.

    If the system or the disk has no locks, every folder counts as free.
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        if hasattr(os, "register_at_fork"):  # else loader processes hold it for seconds after a SIGKILL of this one
            os.register_at_fork(after_in_child=self.release)

    def __getstate__(self) -> dict[str, None]:
        return {"_file": None}  # processes started with a copy do not hold it

    def take(self, folder: Path) -> bool:
        """Lock a run folder instead of the previous one; return whether no other training holds it."""
        if self._file is not None and is_same(self._file.name, folder / CONFIG):
            return True
        self.release()
        try:
            file = open(folder / CONFIG, "rb+")  # noqa: SIM115  it stays open as long as the lock is held
        except OSError:  # missing, or not writable
            return True
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:  # the disk has no locks
            pass
        self._file = file
        return True

    def release(self) -> None:
        """Release it."""
        if self._file is not None:
            self._file.close()
            self._file = None
