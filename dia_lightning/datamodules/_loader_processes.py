"""How loaders run on this machine: processes, workers, memory."""

import os
import signal
import warnings

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer

WORKER_TIMEOUT = 300  # seconds; otherwise a hanging worker would be waited for forever
GRACE = 5  # seconds that a worker outlives the program


def begin_worker(number: int) -> None:
    """Keep a worker alive for the step that the program may still finish after a signal to the process group.

    Args:
        number: of the worker.
    """
    if int(os.environ.get("PL_SEED_WORKERS", "0")):
        pl_worker_init_function(number)  # as Lightning does by default
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # which Windows does not have
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # in the parent process it may be something else
        # but not forever: its parent ends a hanging worker by the same signal
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def replicas(trainer: Trainer | None) -> tuple[int, int]:
    """Return the number of processes that share the data, and the rank of this one."""
    if trainer is not None:
        return trainer.world_size, trainer.global_rank
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def automatic_workers(trainer: Trainer | None) -> int:
    """Return the number of loader processes: up to 4, fewer if the processes of a run would have to share CPUs."""
    local = trainer.num_devices if trainer is not None else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, _cpu_count() // local)


def silence_worker_advice() -> None:
    """Silence only Lightning's advice to use more workers, which is wrong for tiny sets."""
    warnings.filterwarnings("ignore", r"The '\w+_dataloader' does not have many workers", PossibleUserWarning)


def runs_on_cuda(trainer: Trainer | None) -> bool:
    """Return whether batches go to a CUDA device; page-locked memory helps no other."""
    if trainer is not None:
        return trainer.strategy.root_device.type == "cuda"
    return torch.cuda.is_available()


def _cpu_count() -> int:
    # A container or a cluster job may use fewer CPUs than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
