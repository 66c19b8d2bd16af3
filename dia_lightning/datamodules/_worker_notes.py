"""Which sample a loader's process was loading when it died or hung."""

import os
import re
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class NamingLoader(DataLoader[Any]):
    """A loader that fails in the same way whenever a worker dies."""

    def _get_iterator(self) -> _BaseDataLoaderIter:
        return super()._get_iterator() if self.num_workers == 0 else _Iterator(self)


class _Iterator(_MultiProcessingDataLoaderIter):
    def _try_get_data(self, timeout: float = 5.0) -> tuple[bool, Any]:
        try:
            result: tuple[bool, Any] = super()._try_get_data(timeout)  # type: ignore[no-untyped-call]
            return result
        except (EOFError, OSError) as error:  # it died between a batch and the handle to its memory
            time.sleep(0.5)  # until the system knows; torch may raise the same here once notified
            dead = [str(worker.pid) for worker in self._workers if not worker.is_alive()]
            if not dead:
                raise
            raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly") from error


class WorkerNotes:
    """Notes that the workers of a loader leave in memory shared with its process, which outlives them.

    Args:
        workers: number of workers.
    """

    def __init__(self, workers: int) -> None:
        # for each worker: its process, its last sample, and whether that is still being loaded
        self._rows = torch.zeros(workers, 3, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def begin(self, index: int) -> None:
        """Record the sample that this process starts to load."""
        self._write(index, 1)

    def end(self, index: int) -> None:
        """Record that it is loaded."""
        self._write(index, 0)

    def suspects(self, error: BaseException) -> list[int]:
        """Return the last samples of the workers that a loader's error is about; none for other errors."""
        text = str(error)
        died = _DIED.match(text)
        processes = [] if died is None else [int(number) for number in died[1].split(",")]
        hangs = text.startswith("DataLoader timed out")
        rows = self._rows.tolist()
        return [index for process, index, loads in rows if process in processes or (hangs and process and loads)]

    def _write(self, index: int, loads: int) -> None:
        worker = get_worker_info()
        if worker is not None and worker.id < len(self._rows):
            self._rows[worker.id] = torch.tensor([os.getpid(), index, loads])


def add_to_message(error: BaseException, places: Iterable[str]) -> None:
    """Add the samples to the message of a loader's error.

    Args:
        error: raised by torch, with the id of a process that is gone.
        places: the samples of that process.
    """
    found = ", ".join(places)
    if found:
        reason = str(error.__cause__ or "").strip().rstrip(".")
        cause = f" ({reason})" if reason else ""
        error.args = (
            f"{str(error).strip().rstrip('.')}{cause}. It was at or after {found}. A process that is killed has often "
            "run out of memory; num_workers=0 shows other errors where they are made.",
        )
