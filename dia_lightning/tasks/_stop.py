"""Saving and stopping on a signal, at a moment from which training can resume."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dia_lightning.tasks._finite import NonFiniteLossError

_GRACE = 3.0  # seconds for processes to end on their own when another has failed
_ECHO = 1.0  # seconds in which a second Ctrl-C is the same one: launchers forward what the terminal sent to all


class StopOnSignal(Callback):
    """On SIGTERM or Ctrl-C, save at the end of the step and stop, in all processes; requeue a SLURM job likewise.

    Lightning's own handlers communicate and write wherever the signal hits the process, which stalls other processes
    and may save half an optimizer step. Here, handlers only set a flag. The program exits with 143 or 130; a Ctrl-C
    more than a second after the first stops at once.
    """

    def __init__(self) -> None:
        self._stop = 0  # number of the signal
        self._requeue = 0
        self._agrees = True  # whether all processes take equally many steps, and so can communicate after each
        self._asked_at = 0.0  # when Ctrl-C was pressed
        self._parent = os.getppid()

    # ---- signals

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace Lightning's handlers, which it installs before running and removes afterwards."""
        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = self._note_stop
        connector._slurm_sigusr_handler_fn = self._note_requeue

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch Ctrl-C while there is something to save."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note_stop)

    def _note_stop(self, number: int, frame: Any) -> None:
        if self._stop == number == signal.SIGINT:
            if time.monotonic() - self._asked_at > _ECHO:
                raise KeyboardInterrupt
            return
        self._stop, self._asked_at = number, time.monotonic()
        if number == signal.SIGINT:  # print would fail if the signal came in the middle of another one
            os.write(2, b"\nStopping after this step, to save it. Press Ctrl-C again to stop without saving.\n")

    def _note_requeue(self, number: int, frame: Any) -> None:
        self._requeue = number

    # ---- moments

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop after an optimizer step; an epoch that is over is validated first, or saved as usual."""
        loop = trainer.fit_loop
        if loop._should_accumulate() or not self._is_asked(trainer):
            return
        fetcher = loop._data_fetcher
        assert fetcher is not None
        if not loop.epoch_loop._is_training_done and not loop.epoch_loop._should_check_val_fx(fetcher):
            self._save_and_stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether all processes have equally many batches."""
        self._compare_lengths(trainer, trainer.num_val_batches)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop; a training is saved such that it restarts this validation when resumed."""
        if not self._is_asked(trainer):
            return
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            self._halt(trainer)
        elif self._agrees and self._stop:
            progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            before = progress.total.completed - progress.current.completed  # in earlier validations of this epoch
            for each, done in ((progress.total, before), (progress.current, 0)):  # as in the middle of the first batch
                each.processed = each.completed = done
                each.ready = each.started = done + 1
            self._save_and_stop(trainer)
            self._halt(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether all processes have equally many batches."""
        self._compare_lengths(trainer, trainer.num_test_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop."""
        if self._is_asked(trainer):
            self._halt(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether all processes have equally many batches."""
        self._compare_lengths(trainer, trainer.num_predict_batches)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop here, unlike Lightning."""
        if self._is_asked(trainer):
            self._halt(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report the signal even if it came too late to skip anything."""
        if self._stop:
            self._halt(trainer)

    # ---- what happens then

    def _is_asked(self, trainer: Trainer) -> bool:
        """Return whether any process was asked to stop or to requeue."""
        if trainer.world_size > 1 and self._agrees:
            noted = torch.tensor([self._stop, self._requeue], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(noted, torch.distributed.ReduceOp.MAX)
            self._stop, self._requeue = noted.tolist()
        return bool(self._stop or self._requeue)

    def _compare_lengths(self, trainer: Trainer, batches: Sequence[int | float] | int | float) -> None:
        if trainer.world_size > 1 and not trainer.sanity_checking:
            count = float(sum(batches) if isinstance(batches, Sequence) else batches)  # infinity minus itself is not 0
            extremes = torch.tensor([count, -count], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
            self._agrees = bool(extremes.sum() == 0)

    def _save_and_stop(self, trainer: Trainer) -> None:
        _save(trainer)  # first: where Lightning's own checkpoint goes, other jobs may write too
        if self._requeue:
            connector = trainer._signal_connector
            number, self._requeue = self._requeue, 0
            type(connector)._slurm_sigusr_handler_fn(connector, number, None)  # type: ignore[arg-type]
        if self._stop:
            trainer._signal_connector.received_sigterm = True  # Lightning stops when the metrics are logged

    def _halt(self, trainer: Trainer) -> None:
        if self._stop:
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Set the program's exit code, and report which process failed."""
        children = getattr(trainer.strategy.launcher, "procs", [])
        if not all(isinstance(child, subprocess.Popen) for child in children):
            children = []  # multiprocessing ends them itself
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + (self._stop or signal.SIGTERM)
        if isinstance(exception, (SIGTERMException, NonFiniteLossError)):
            children.clear()  # all end on their own: Lightning would kill this process for the exit code of another
        elif trainer.world_size > 1 and not isinstance(exception, KeyboardInterrupt):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = False  # would wait for processes that are gone
            self._name_the_dead(trainer, exception, children)
            _end_all(children)

    def _name_the_dead(self, trainer: Trainer, exception: BaseException, children: list[Any]) -> None:
        rank = trainer.global_rank
        first = next(iter(str(exception).splitlines()), "")
        lines = [f"rank {rank} of {trainer.world_size} ends with {type(exception).__name__}: {first}"]
        time.sleep(0.5)  # a connection closes before the process is gone
        if children:
            ended = [(number, child.pid, child.poll()) for number, child in enumerate(children, start=1)]
            lines += [f"rank {number} (process {pid}) {_end(code)}" for number, pid, code in ended if code]
        elif rank > 0 and os.getppid() != self._parent:
            lines.append(f"rank 0 (process {self._parent}) is gone")
        if "timed out" in str(exception).lower():
            lines.append("a rank that prints no such line is the one that hangs")
        print("\n".join(lines), file=sys.stderr, flush=True)


def _end_all(children: list[Any]) -> None:
    """Let other processes report what happened to them, and end those that hang."""
    mine = list(children)
    children.clear()  # Lightning would kill this process for the exit code of another
    until = time.monotonic() + _GRACE
    for number, child in enumerate(mine, start=1):
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            print(f"rank {number} (process {child.pid}) hung, or waited, and was ended", file=sys.stderr, flush=True)


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _save(trainer: Trainer) -> None:
    """Save where the newest checkpoint goes: next to the best one if there is no place for it."""
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    callbacks = [each for each in callbacks if not each.save_weights_only]
    if any(each._last_global_step_saved == trainer.global_step for each in callbacks) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    newest = [each for each in callbacks if each.save_last or (each.monitor is None and each.save_top_k != 0)]
    for callback in newest or callbacks[:1]:
        metrics = callback._monitor_candidates(trainer)
        if callback.monitor is None:
            callback._save_topk_checkpoint(trainer, metrics)
        kept = callback.save_last
        callback.save_last = kept or not newest
        callback._save_last_checkpoint(trainer, metrics)
        callback.save_last = kept
