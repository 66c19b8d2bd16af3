"""What happens around a training: continuing its run, how to resume it, and the test after it."""

import warnings
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from dia_lightning.cli._errors import UserError
from dia_lightning.cli._notes import say
from dia_lightning.cli.runs._resume import KeepRunTogether, take_up
from dia_lightning.cli.runs._saved_config import wandb_id
from dia_lightning.datamodules import DIADataModule
from dia_lightning.loggers.wandb import WandbLogger


class CheckLaterTest(Callback):
    """Refuse a fit with ``test_after_fit`` whose test could not start."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check in every process, once the data are available and before training."""
        if stage != "fit":
            return
        if not is_overridden("test_step", pl_module):
            raise UserError(
                f"test_after_fit: {type(pl_module).__name__} has no test_step to run. Add one, or use "
                "--test_after_fit false."
            )
        data: DIADataModule = trainer.datamodule  # type: ignore[attr-defined]
        try:
            data.check_test_data()
        except (ValueError, OSError) as error:
            raise UserError(
                f"test_after_fit: {str(error).rstrip('.')}. Fix this, or leave test_after_fit out and run test "
                "separately."
            ) from error


def begin_anew(trainer: Trainer) -> None:
    """Keep Lightning from loading checkpoints of other jobs, which it does unless it believes that a path was set."""
    trainer._checkpoint_connector._user_managed = True
    warnings.filterwarnings("ignore", message="`trainer.ckpt_path = None` was called")


def go_on_in_run(trainer: Trainer, together: KeepRunTogether) -> None:
    """Continue in the run of the checkpoint, if any, unless the options specify another."""
    source = together.source
    if source is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.is_global_zero and source.folder is not None and not together.lock.take(source.folder):
        source = together.source = replace(source, busy=True)
    run_id = wandb_id(source.folder) if source.folder is not None and source.obstacle is None else None
    for logger in trainer.loggers:
        if run_id is not None and isinstance(logger, WandbLogger) and logger.version is None:
            logger.resume(run_id)
            say(f"resuming the Weights & Biases run {run_id}; to start a new one, give the logger a new id")
    say(take_up(trainer, source))
    # Lightning's; it is intended here
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")


def say_if_nothing_was_trained(trainer: Trainer, together: KeepRunTogether, ckpt_path: str | None) -> None:
    """Say if nothing was trained because the checkpoint was at its end, or if this was only a dry run."""
    if ckpt_path is None:
        return
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        say(f"fast_dev_run looks at the first epoch alone: how training goes on from {ckpt_path} was not tried")
    elif not together.has_trained:
        say(
            f"nothing was left to train: {ckpt_path} is at the end of the training "
            f"(--trainer.max_epochs {trainer.max_epochs}, --trainer.max_steps {trainer.max_steps}). "
            "To train longer, raise them."
        )


def checkpoint_to_test(trainer: Trainer, together: KeepRunTogether, ckpt_path: str | None) -> str | None:
    """Return the best checkpoint of a training, else its final one; ``None`` for the last weights."""
    best = [callback.best_model_path for callback in _model_checkpoints(trainer) if callback.monitor is not None]
    path = next(filter(None, best), None if together.has_trained else ckpt_path)
    say(f"testing {path or 'the last weights (there is no best checkpoint)'}")
    return path


def say_how_to_resume(trainer: Trainer) -> None:
    """Print the newest checkpoint of an interrupted training."""
    saved = [callback.last_model_path or callback.best_model_path for callback in _model_checkpoints(trainer)]
    files = [path for path in saved if path and Path(path).exists()]
    if files:
        newest = max(files, key=lambda path: Path(path).stat().st_mtime_ns)
        say(f"stopped; repeat the command with --ckpt_path {newest} to go on from there")
    else:
        say("stopped before the first checkpoint: there is nothing to resume from")


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
