"""A signal stops a training after the step, saved such that it goes on as if nothing had happened."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, TensorDataset

from dia_lightning.tasks import _stop
from tests.tasks.tiny_training import fit, loader, tiny_task


class Send(Callback):
    """Sends a signal to this process at a moment, and notes which steps and validations there were."""

    def __init__(self, number: int = 0, moment: str = "", step: int = 6, times: int = 1) -> None:
        self.number, self.moment, self.step, self.times = number, moment, step, times
        self.steps: list[int] = []
        self.validations: list[tuple[int, int]] = []

    def send(self, trainer: Any, moment: str) -> None:
        if moment == self.moment and trainer.global_step == self.step and not trainer.sanity_checking:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.send(trainer, "start")

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        self.send(trainer, "optimizer")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.steps.append(trainer.global_step)
        self.send(trainer, "end")

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.validations.append((trainer.global_step, args[-1]))
        if args[-1] == 1:
            self.send(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self.send(trainer, "epoch")

    def on_predict_batch_end(self, trainer: Any, *args: Any) -> None:
        self.steps.append(args[-1])
        self.send(trainer, "predict")


def equal_batches(count: int) -> DataLoader[Any]:
    """Return a loader of which it does not matter where it goes on."""
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images.repeat(count, 1, 1, 1), torch.arange(2).repeat(count)), batch_size=2)


def train(folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train two epochs of four steps, each with a validation of three batches, and return the metrics."""
    task = tiny_task()
    torch.manual_seed(0)
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    saved = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": 2, "num_sanity_val_steps": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(**{**defaults, **quiet, **options, "callbacks": [*callbacks, saved]})
    trainer.fit(task, equal_batches(4), equal_batches(3), ckpt_path=ckpt_path, weights_only=True)
    weights: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return {**weights, "val/loss": trainer.callback_metrics["val/loss"]}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("moment", "step", "saved_step"),
    [("start", 5, 6), ("optimizer", 5, 6), ("end", 6, 6), ("end", 4, 4), ("validation", 4, 4), ("epoch", 4, 5)],
)
def test_a_stopped_training_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, number: int, code: int, moment: str, step: int, saved_step: int
) -> None:
    straight = Send()
    expected = train(tmp_path / "straight", straight)
    before, after = Send(number, moment, step), Send()
    with pytest.raises(SIGTERMException) as stop:
        train(tmp_path, before)
    assert stop.value.code == code
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == before.steps[-1] == saved_step
    found = train(tmp_path, after, ckpt_path=tmp_path / "last.ckpt")
    assert before.steps + after.steps == straight.steps
    assert [each for each in after.validations if each[0] > 4] == [each for each in straight.validations if each[0] > 4]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_training_that_accumulates_stops_after_a_whole_optimizer_step(tmp_path: Path) -> None:
    send = Send(signal.SIGTERM, "start", 2)
    with pytest.raises(SIGTERMException):
        train(tmp_path, send, accumulate_grad_batches=2)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_where_only_the_best_is_saved_the_last_is_put_beside_it(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    with pytest.raises(SIGTERMException):
        fit(tiny_task(), callbacks=[Send(signal.SIGTERM, "end"), best], enable_checkpointing=True, max_epochs=2)
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.iterdir()}
    assert steps == {"best.ckpt": 4, "last.ckpt": 6}


def test_a_ctrl_c_that_comes_twice_at_once_is_one(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException) as stop:
        train(tmp_path, Send(signal.SIGINT, "start", 5, times=2))
    assert stop.value.code == 130
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_second_ctrl_c_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_stop, "_ECHO", 0.0)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, Send(signal.SIGINT, "start", 5, times=2))
    assert not isinstance(stop.value, SIGTERMException)
    assert "Ctrl-C again" in capfd.readouterr().err
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_prediction_stops_after_its_batch() -> None:
    send = Send(signal.SIGTERM, "predict", 0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[send])
    images = DataLoader(loader().dataset, batch_size=2)
    with pytest.raises(SIGTERMException) as stop:
        trainer.predict(tiny_task(), images)
    assert (send.steps, stop.value.code) == ([0], 143)


def test_slurm_requeues_a_job_with_a_checkpoint_of_whole_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    options: dict[str, Any] = {
        "plugins": [SLURMEnvironment(requeue_signal=signal.SIGUSR2)],
        "default_root_dir": tmp_path,
    }
    expected = train(tmp_path / "straight")
    train(tmp_path / "first", Send(signal.SIGUSR2, "optimizer", 5), **options)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 6
    again = Send()
    found = train(tmp_path / "again", again, **options)  # finds the checkpoint by itself
    assert again.steps == [7, 8]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
