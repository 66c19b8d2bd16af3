"""A signal to all processes of a group leaves the workers of a loader to their own process."""

import os
import signal

import pytest

from dia_lightning.datamodules import DigitsDataModule


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
