"""The moment a checkpoint was written, where Lightning's loops would not resume exactly."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from torch import Tensor
from torchmetrics import MetricCollection


@dataclass
class ResumePoint:
    """What to do when a training resumes.

    Args:
        after_batch: the checkpoint was written after a batch and before the validation or epoch end that may follow,
            which Lightning would skip.
        after_last_batch: the batch was the last of its epoch, whose end is still to come.
        at_epoch_end: the checkpoint was written at the end of an epoch, before schedules that watch a metric.
        callbacks: their states by key, which callbacks may change until training starts.
        logged: metrics that callbacks and schedules may ask for before they are logged again.
        gradients: accumulated since the last optimizer step.
    """

    after_batch: bool
    after_last_batch: bool
    at_epoch_end: bool
    callbacks: dict[str, Any]
    logged: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, checkpoint: dict[str, Any], state: dict[str, Any]) -> "ResumePoint":
        """Read it from a checkpoint, whose loops are not loaded yet, and from the state of this process in it.

        The checkpoint counts an epoch's last batch as done, so Lightning would consider the epoch done.
        """
        loops = checkpoint["loops"]["fit_loop"]
        batches, epoch = loops["epoch_loop.batch_progress"], loops["epoch_progress"]["current"]
        in_epoch = epoch["processed"] == epoch["started"] - 1
        after_batch = in_epoch and batches["current"]["completed"] == batches["current"]["processed"] - 1
        after_last_batch = in_epoch and batches["is_last_batch"]
        if after_batch and after_last_batch:
            for progress in (batches["current"], batches["total"]):
                progress["completed"] += 1
        at_epoch_end = epoch["processed"] == epoch["started"] == epoch["completed"] + 1
        return cls(
            after_batch,
            after_last_batch,
            at_epoch_end,
            checkpoint.get("callbacks", {}),
            state.get("logged", {}),
            state.get("gradients", {}),
        )

    def enter(self, trainer: Trainer, task: LightningModule) -> None:
        """Make a training that is about to start resume from here."""
        trainer.callback_metrics.update(self.logged)
        for callback in trainer.checkpoint_callbacks:
            found = self.callbacks.get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and found:
                callback.current_score = found.get("current_score")  # the one entry it does not restore itself
        loop = trainer.fit_loop
        loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()  # an interrupted validation starts over
        if self.at_epoch_end and self.logged and loop.epoch_loop._num_ready_batches_reached():
            self._step_watching_schedules(trainer)
        if loop.restarted_on_epoch_end:  # with max_steps, Lightning would rerun the finished epoch without batches
            loop.reset_restart_stage()
            loop.epoch_progress.increment_completed()
            loop._restarting = loop.epoch_loop.restarting = False
        elif self.after_batch:
            self._do_what_follows(trainer)
        for name, parameter in task.named_parameters():
            if name in self.gradients:
                parameter.grad = self.gradients[name].to(parameter)

    def _step_watching_schedules(self, trainer: Trainer) -> None:
        epochs: Any = trainer.fit_loop.epoch_progress.current
        now, epochs.completed = epochs.completed, epochs.started - 1  # their frequency depends on this epoch's number
        trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epochs.completed = now

    def _do_what_follows(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if loop._should_check_val_fx(fetcher):
            if not self.after_last_batch:
                loop.batch_progress.increment_completed()
                loop.update_restart_stage()
            loop.val_loop.batch_progress.reset_on_run()
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        elif self.after_last_batch:
            loop.on_advance_end(fetcher)
            loop.val_loop._has_run = True  # otherwise Lightning would take a batch of the next epoch

    def end_epoch(self, trainer: Trainer, task: LightningModule) -> None:
        """End the first epoch like any other."""
        trainer.fit_loop.restarting = False  # otherwise schedules that watch a metric are skipped
        if self.after_last_batch:  # nothing was logged, as there was no training step
            for metrics in task.children():
                if isinstance(metrics, MetricCollection) and metrics.prefix == "train/":
                    task.log_dict(metrics)
