"""Continue a training where it stopped: in the folder of its run, with its best checkpoint and its metrics."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.callbacks import run_folder
from dia_lightning.cli.runs.lock import RunLock
from dia_lightning.cli.runs.moved_checkpoints import moved_state
from dia_lightning.cli.runs.run_of_checkpoint import RECORD, RunSource, is_same
from dia_lightning.loggers.continued import drop_rows, go_on, go_on_with_a_copy
from dia_lightning.loggers.wandb import WandbLogger


class KeepRunTogether(Callback):
    """Record in every checkpoint which run it belongs to, and reassemble a resumed run."""

    def __init__(self) -> None:
        self.source: RunSource | None = None
        self.job: str | None = None
        self.lock = RunLock()
        self.has_trained = False
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder while all ranks can still communicate."""
        self._folder = run_folder(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lock the run folder against other trainings until this one ends; its config exists by now."""
        if trainer.is_global_zero and not self.lock.take(self._folder):
            rank_zero_warn(
                f"Another training is writing to {self._folder}, and this one does too: checkpoints and metrics of "
                "both will mix. Stop one of them, and give it another name or version of its logger."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Carry over the best checkpoints, wherever the run is now."""
        is_dry = getattr(trainer, "fast_dev_run", False)  # saves no checkpoint, so none is copied
        if self.source is None or trainer.state.fn != TrainerFn.FITTING or is_dry:
            return
        for callback in trainer.checkpoint_callbacks:
            state = self.source.states.get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state is not None and state.get("dirpath") is not None:
                moved = moved_state(state, callback, self.source.place) if trainer.is_global_zero else None
                if self.source.later is not None and is_same(callback.dirpath or "", self.source.place):
                    rank_zero_warn(
                        f"{self.source.place} has a later checkpoint, {self.source.later.name}, and may lose it: this "
                        "training writes there too. Give another --trainer.default_root_dir or dirpath to keep both."
                    )
                checkpoint["callbacks"][callback.state_key] = trainer.strategy.broadcast(moved)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what was logged after the checkpoint, now that nothing can fail before it is trained again."""
        self.has_trained = True
        if self.source is not None:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    drop_rows(logger, trainer.global_step)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the results of a test that is repeated because nothing was left to train."""
        if self.source is not None and not self.has_trained:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    drop_rows(logger, trainer.global_step, tests=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was logged after the checkpoint of the last epoch."""
        _save_logs(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what was logged so far: a run that resumes from here would not log it again."""
        _save_logs(trainer)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, (CSVLogger, TensorBoardLogger))]
        versions = {logger.root_dir: logger.version for logger in loggers}
        record = {"folder": str(self._folder), "versions": versions}
        checkpoint.setdefault(RECORD, {}).update(record if self.job is None else {**record, "job": self.job})


def take_up(trainer: Trainer, source: RunSource) -> str:
    """Point the loggers of a trainer to the run of a checkpoint; call it before ``fit``.

    Args:
        trainer: its loggers must not have been used.
        source: the run of the checkpoint.

    Returns:
        A line about the folder in which training continues: the run's if nothing prevents it and the options lead
        there, otherwise a new one with a copy of the metrics.

    Raises:
        ValueError: if the loggers' options ask for the folder of a run that has a later checkpoint or that another
            training writes to.
    """
    _check_does_not_mix(trainer, source)
    first = trainer.loggers[0] if trainer.loggers else None
    if source.obstacle is None and source.folder is not None and _leads(first, source.folder, source, trainer):
        for logger in trainer.loggers:
            if not isinstance(logger, (CSVLogger, TensorBoardLogger)):
                continue
            if logger is first or _adopts(logger, source.versions.get(logger.root_dir)):
                go_on(logger, source.step)
        return f"continuing in the run folder {source.folder}"
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and source.folder is not None:
            go_on_with_a_copy(logger, source.folder)
    reason = source.obstacle or f"the options do not lead to {source.folder}"
    if first is None:
        return f"{reason}: continuing in {trainer.default_root_dir}, the one folder of all runs without a logger"
    metrics = "" if source.folder is None else " and of the metrics up to now"
    return f"{reason}: continuing in a new run folder, with a copy of the best checkpoint{metrics}"


def _check_does_not_mix(trainer: Trainer, source: RunSource) -> None:
    if source.folder is None or not (source.busy or source.later):
        return
    for logger in trainer.loggers:
        place = _folder_of(logger)
        if place is not None and is_same(place, source.folder):
            raise ValueError(
                f"The options of {type(logger).__name__} ask for {place}, but {source.obstacle}: both trainings would "
                "mix. Give the logger another version or id, or leave it out."
            )


def _leads(first: Logger | None, folder: Path, source: RunSource, trainer: Trainer) -> bool:
    """Return whether the first logger can write to a folder, and set the version with which it does."""
    if first is None:
        return is_same(trainer.default_root_dir, folder)
    if isinstance(first, (CSVLogger, TensorBoardLogger)) and first._version is None:
        here = is_same(first.root_dir, folder.parent)  # even if the folder was renamed
        return _adopts(first, _version_of(folder) if here else source.versions.get(first.root_dir), folder)
    place = _folder_of(first)
    return place is not None and is_same(place, folder)


def _folder_of(logger: Logger) -> Path | None:
    """Return the run folder that a logger with a version sets if it is the first one."""
    if isinstance(logger, (CSVLogger, TensorBoardLogger)) and logger._version is not None:
        return Path(logger.log_dir)
    if isinstance(logger, WandbLogger) and logger.version is not None:
        return Path(logger.save_dir or ".", str(logger.name), logger.version)
    return None


def _adopts(logger: CSVLogger | TensorBoardLogger, version: int | str | None, folder: Path | None = None) -> bool:
    """Set the version of a logger if it does not contradict an existing one and leads to the folder."""
    # a name from a checkpoint must not lead to another folder
    if version is None or Path(str(version)).name != str(version):
        return False
    given = logger._version
    if given is not None and _name_of(given) != _name_of(version):
        return False
    logger._version = version
    if folder is None or is_same(logger.log_dir, folder):
        return True
    logger._version = given
    return False


def _name_of(version: int | str) -> str:
    return version if isinstance(version, str) else f"version_{version}"


def _version_of(folder: Path) -> int | str:
    found = re.fullmatch(r"version_(0|[1-9]\d*)", folder.name)
    return folder.name if found is None else int(found[1])


def _save_logs(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        logger.save()
