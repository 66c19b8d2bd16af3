"""Two processes on this machine's CPU, which have imported beforehand what `conftest.py` names."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import start_processes


def on_two_processes() -> dict[str, Any]:
    """Return the options that make a trainer on the CPU run on both."""
    return {"devices": 2, "strategy": DDPStrategy(start_method="forkserver")}


def run_on_two_processes(function: Callable[..., None], *args: Any) -> None:
    """Call a function of a module with the number of the process, 0 or 1, and the arguments."""
    start_processes(function, args, nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
