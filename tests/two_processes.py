"""Two processes on this machine's CPU, which have already imported what `conftest.py` names."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import start_processes


class _OwnWeights(DDPStrategy):
    """Gives each process its own weights, which Lightning only does for the start method "spawn"."""

    @torch.no_grad()
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        for tensor in chain(self.lightning_module.parameters(), self.lightning_module.buffers()):
            tensor.data = tensor.data.clone()
        super().setup_environment()


def on_two_processes() -> dict[str, Any]:
    """Return the options that make a trainer on the CPU run on both.

    They do not see this process's seeds and flags, nor environment variables that it set after the first use.
    """
    return {"devices": 2, "strategy": _OwnWeights(start_method="forkserver")}


def run_on_two_processes(function: Callable[..., None], *args: Any) -> None:
    """Call a function of a module with the number of the process, 0 or 1, and the arguments."""
    start_processes(function, args, nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
