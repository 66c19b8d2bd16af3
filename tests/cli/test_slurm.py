"""A job that SLURM queues again goes on in the run that it began, and no other job does."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from tests.cli.conftest import Run
from tests.cli.test_resume import rows

RUNS = Path("runs/tiny")
LAST = RUNS / "version_0/checkpoints/last.ckpt"
FIT = ["fit", "-c", "tiny.yaml", "--trainer.max_epochs", "3"]


class Preempt(Callback):
    """Once, tells the training in mid-epoch that its job ends soon, and ends it at the start of the next step."""

    def __init__(self, warns: bool = True) -> None:
        self.warns = warns

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and self.warns and not Path("ended").exists():
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and not Path("ended").exists():
            Path("ended").touch()
            raise KeyboardInterrupt


@pytest.fixture
def cluster(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A job of SLURM, whose `scontrol` notes what it was asked."""
    scontrol = workplace / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {workplace}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NODELIST": "localhost"}
    for name, value in {**job, "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setitem(sys.modules, "preempting", sys.modules[__name__])
    return monkeypatch


def test_a_requeued_job_goes_on_in_its_run_and_other_jobs_begin_their_own(
    run: Run, cluster: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*FIT, "--trainer.callbacks+=preempting.Preempt"]
    with pytest.raises(SystemExit):
        run(*command)
    assert Path("requeued").read_text() == "requeue 7\n"
    assert torch.load("hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 3

    cluster.setenv("SLURM_JOB_ID", "8")
    capsys.readouterr()
    run(*command)
    assert "going on from" not in capsys.readouterr().err
    other = rows(RUNS / "version_1")
    assert [step for _, step, names in other if "train/loss" in names] == ["0", "1", "2", "3", "4", "5"]

    cluster.setenv("SLURM_JOB_ID", "7")
    cluster.setenv("SLURM_RESTART_COUNT", "1")
    run(*command)
    assert f"the job was queued again: going on from {LAST}" in capsys.readouterr().err
    assert rows(RUNS / "version_0") == other
    assert sorted(path.name for path in RUNS.iterdir()) == ["version_0", "version_1"]


def test_a_job_that_was_killed_without_a_word_goes_on_from_its_last_checkpoint(
    run: Run, cluster: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*FIT, "--trainer.callbacks+=preempting.Preempt", "--trainer.callbacks.init_args.warns", "false"]
    with pytest.raises(SystemExit):
        run(*command)
    run(*FIT, "--trainer.max_epochs", "1")  # another command of the same job, later
    LAST.with_name("damaged.ckpt").write_bytes(LAST.read_bytes()[:-1000])
    cluster.setenv("SLURM_RESTART_COUNT", "2")
    run(*command)
    assert f"the job was queued again: going on from {LAST}" in capsys.readouterr().err
    steps = [step for _, step, names in rows(RUNS / "version_0") if "train/loss" in names]
    assert steps == ["0", "1", "2", "3", "4", "5"]
