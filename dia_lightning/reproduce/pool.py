"""Runs of an experiment as separate processes, several at a time."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from dia_lightning._redact import redact_arguments
from dia_lightning.reproduce.experiment import Experiment, Run
from dia_lightning.reproduce.results import Result, last_values, write_result

try:
    import fcntl
except ImportError:  # Windows; two calls at the same time are not noticed there
    fcntl = None  # type: ignore[assignment]

COMMAND = (sys.executable, "-m", "dia_lightning")
LOG = "log.txt"
GRACE = 10.0  # seconds from SIGTERM to SIGKILL
#: Nothing is fetched or sent, unless the caller's environment says otherwise.
OFFLINE = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    folder: Path
    started: float


def run_all(
    runs: Sequence[Run],
    experiment: Experiment,
    folder: Path,
    lock: IO[str],
    jobs: int,
    begin: Callable[[Run], None],
    report: Callable[[Run, Result], None],
) -> None:
    """Start the runs, as many at a time as there are jobs, and write the result of each into its folder.

    If this ends early, by an error, Ctrl-C or a termination signal, the processes are ended too; the next call repeats
    what they have done so far.

    Args:
        runs: which of the experiment's to start. What is left of earlier attempts is removed.
        experiment: what they belong to.
        folder: of the experiment.
        lock: of the folder, from :func:`locked`.
        jobs: number of parallel runs, at least 1.
        begin: called with every run that starts.
        report: called with every run that has ended and its result.

    Raises:
        ValueError: if a run has ended well and has not logged what is to be compared, as all others would.
    """
    waiting, free = deque(runs), _environments(jobs)
    running: list[_Child] = []
    with _ended_by_signal():
        try:
            while waiting or running:
                while waiting and free:
                    begin(waiting[0])
                    running.append(_start(waiting.popleft(), folder, free.pop(0), lock))
                for child in [child for child in running if child.process.poll() is not None]:
                    result = _result_of(child, experiment)
                    write_result(result, child.folder)
                    running.remove(child)
                    free.append(dict(child.environment))
                    report(child.run, result)
                    if child.process.returncode == 0 and result.outcome == "failed":
                        raise ValueError(result.message)
                time.sleep(0.05)
        finally:
            _end(running)


def _environments(jobs: int) -> list[dict[str, str]]:
    """Return each job's share of the machine: threads of the CPU, or one GPU."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus // jobs))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if torch.cuda.device_count() == 0:
        return [share] * jobs
    return [{**share, "CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(jobs)]


def _start(run: Run, root: Path, environment: Mapping[str, str], lock: IO[str]) -> _Child:
    folder = root / run.place
    if folder.exists():  # an attempt that was killed or failed
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    inherited = {name: value for name, value in os.environ.items() if name != "DIA_TRACEBACK"}
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(
            [*COMMAND, *run.command_in(root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**OFFLINE, **inherited, **environment},
            pass_fds=[] if fcntl is None else [lock.fileno()],
        )
    lock.write(f"{process.pid}\n")
    lock.flush()
    return _Child(run, process, environment, folder, time.monotonic())


def _result_of(child: _Child, experiment: Experiment) -> Result:
    from dia_lightning.tasks import NonFiniteLossError  # imports Lightning, which --help does without

    code = child.process.returncode
    metrics = last_values(child.folder / "metrics.csv")
    missing = [metric.name for metric in experiment.metrics if metric.name not in metrics]
    result = Result(
        outcome="finished",
        metrics=metrics,
        seconds=round(time.monotonic() - child.started, 1),
        command=redact_arguments(child.run.command),
        configs=dict(experiment.digests),
        environment=dict(child.environment),
    )
    if code == 0 and not missing:
        return result
    if code == 0:
        known = ", ".join(metrics) or "nothing"
        message = (
            f"metrics: a run of '{child.run.arm}' has ended and logged no {missing[0]}, but {known}. Name one of "
            "these; test metrics need the option test_after_fit: true."
        )
    else:
        message = _last_line(child.folder / LOG)
        message = message if code > 0 else f"ended by {signal.Signals(-code).name}; before: {message}"
    outcome = "diverged" if code == NonFiniteLossError.exit_code else "failed"
    return Result(**{**vars(result), "outcome": outcome, "message": message})


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("dia-lightning: error: ") if lines else "nothing"


def _end(children: Sequence[_Child]) -> None:
    for child in children:
        child.process.terminate()
    until = time.monotonic() + GRACE
    for child in children:
        try:
            child.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Turn a termination signal into an error, which ends the runs too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Lock the folder of an experiment against other calls; create it if missing.

    The runs inherit the lock: one that a killed call has left behind would write into the files of its successor.

    Raises:
        ValueError: if another process is using the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+", encoding="utf-8") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            alive = [pid for pid in lock.read().split() if _is_alive(int(pid))]
            raise ValueError(
                f"{folder} is in use (processes {', '.join(alive)}): another call works there, or one that was killed "
                "has left runs behind. Wait until they have ended, or end them."
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield lock


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
