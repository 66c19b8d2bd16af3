"""One training at a time writes to the folder of a run."""

import os
from pathlib import Path
from typing import BinaryIO

from dia_lightning.cli.runs.run_of_checkpoint import CONFIG, is_same

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """A lock on the config of a run, which the system lets go when the process ends, however it does.

    Where the system or the disk has no locks, every folder is taken for free.
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        if hasattr(os, "register_at_fork"):  # loader processes would hold it for seconds after a SIGKILL of this one
            os.register_at_fork(after_in_child=self.release)

    def __getstate__(self) -> dict[str, None]:
        return {"_file": None}  # processes that are started with a copy do not have it

    def take(self, folder: Path) -> bool:
        """Lock a run folder in place of the one before; return whether no other training has it."""
        if self._file is not None and is_same(self._file.name, folder / CONFIG):
            return True
        self.release()
        try:
            file = open(folder / CONFIG, "rb+")  # noqa: SIM115  it stays open as long as the lock is held
        except OSError:  # there is none, or nobody may write there
            return True
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:  # of a disk without locks
            pass
        self._file = file
        return True

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None
