"""A signal to all processes of a group leaves a loader's workers to their process, and one that fails is explained."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dia_lightning.datamodules import DigitsDataModule, SampleError, base
from dia_lightning.datamodules._sampling import ClassificationSamples
from tests.tasks.conftest import small_task, small_trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_by_more_than_a_step(number: int) -> None:
    data = DigitsDataModule(image_size=8, batch_size=64, num_workers=2, limit=400, pin_memory=False)
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    _, _ = next(batches), next(batches)  # one of each worker, so that both have begun
    for worker in batches._workers:  # type: ignore[attr-defined]
        os.kill(worker.pid, number)
    left = sum(1 for _ in batches)
    assert left == len(data.train_dataloader()) - 2


def spoil(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], object]) -> int:
    """Let something happen where sample 17 of the training data is loaded, and return where that comes from."""
    data = DigitsDataModule(image_size=8, limit=400)
    data.setup("fit")
    position = int(data.train_dataloader().dataset._positions[17])  # type: ignore[attr-defined]
    load = ClassificationSamples.load

    def spoiled(samples: ClassificationSamples, at: int) -> Any:
        if at == position and samples._role == "train":
            fail()
        return load(samples, at)

    monkeypatch.setattr(ClassificationSamples, "load", spoiled)
    return position


FAILURES: list[tuple[Callable[[], object], str]] = [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), r"DataLoader worker \(pid.* It was at or after"),
    (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"DataLoader worker \(pid.* It was at or after"),
    (lambda: os._exit(3), r"DataLoader worker \(pid.* It was at or after"),
    (lambda: time.sleep(100), r"DataLoader timed out after 2 seconds\. It was at or after"),
]


@pytest.mark.parametrize(("fail", "message"), FAILURES, ids=["killed", "segfault", "exit", "hangs"])
def test_a_worker_that_dies_or_hangs_is_named_with_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], object], message: str
) -> None:
    position = spoil(monkeypatch, fail)
    monkeypatch.setattr(base, "WORKER_TIMEOUT", 2)
    data = DigitsDataModule(image_size=8, batch_size=40, num_workers=2, limit=400)
    sample = re.escape(f"sample 17 (train/{position}) of the train data of DigitsDataModule. A process that is killed")
    with pytest.raises(RuntimeError, match=f"{message} {sample}"):
        small_trainer(tmp_path).fit(small_task(), data)


def test_a_worker_that_would_end_the_program_in_a_sample_fails_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    position = spoil(monkeypatch, lambda: sys.exit(0))
    data = DigitsDataModule(image_size=8, batch_size=40, num_workers=1, limit=400)
    data.setup("fit")
    with pytest.raises(SampleError, match=rf"Sample 17 \(train/{position}\) cannot be loaded: SystemExit 0\."):
        list(data.train_dataloader())
