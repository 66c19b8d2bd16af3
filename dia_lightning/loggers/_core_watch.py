"""Ends programs that would otherwise wait forever for a hung process."""

import atexit
import sys
import threading
from subprocess import Popen
from typing import Any


class CoreWatch(threading.Thread):
    """Kill W&B's process if it is still alive some time after this one began to exit.

    W&B's own ``finish_timeout`` is kept by that process, which does not help when it hangs.

    Args:
        process: the process to kill.
        patience: seconds until then.
        folder: of the run, for the message.
    """

    def __init__(self, process: "Popen[Any]", patience: float, folder: str) -> None:
        super().__init__(daemon=True, name="wandb-core-watch")
        self._process, self._patience, self._folder = process, patience, folder
        self._begun = threading.Event()
        self._done = threading.Event()

    def start(self) -> None:
        """Start waiting for the end of the program, when it would be too late to start a thread."""
        super().start()
        atexit.register(self._begun.set)  # runs before W&B's own, which came earlier

    def run(self) -> None:
        """Wait for the end of the program or of the run, and then for W&B."""
        self._begun.wait()
        if not self._done.wait(self._patience):
            self._process.kill()
            sys.stderr.write(
                f"Weights & Biases did not end within {self._patience:.0f} seconds and was stopped. What it has "
                f"written is in {self._folder}; upload it with `wandb sync {self._folder}`.\n"
            )

    def __enter__(self) -> None:
        """Start counting the seconds."""
        self._begun.set()

    def __exit__(self, *exception: object) -> None:
        """Stop counting."""
        self._done.set()
