"""Learning rates, epoch by epoch, against hand-written numbers, and step by step against torchvision's reference."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, MultiStepLR

from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks._schedule import Curve, NamedSchedule
from tests.tasks.conftest import Rates, small_task, small_trainer


def rates(epochs: int, name: str, warmup_epochs: int = 0, milestones: list[int] | None = None) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = NamedSchedule(optimizer, Curve(name, "epoch", milestones or [], 0.1, warmup_epochs, epochs))
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_step_lowers_the_rate_when_the_epoch_counted_from_zero_is_a_milestone() -> None:
    # As in the authors' script: `if epoch in schedule: lr *= gamma`, before the epoch.
    assert rates(6, "step", milestones=[2, 4]) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_milestones_count_epochs_of_warm_up_too() -> None:
    expected = [1 / 3, 2 / 3, 1, 1, 0.1, 0.1]
    assert rates(6, "step", warmup_epochs=2, milestones=[4]) == pytest.approx(expected)


def test_cosine_falls_along_half_a_cosine() -> None:
    assert rates(4, "cosine") == pytest.approx([(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)])


def test_cosine_starts_after_the_warm_up() -> None:
    expected = [0.5, *((1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4))]
    assert rates(5, "cosine", warmup_epochs=1) == pytest.approx(expected)


def test_constant_keeps_the_rate() -> None:
    assert rates(3, "constant") == [1, 1, 1]


# ---- warm-up in steps


def rates_of_torchvision(epochs: int, steps: int, warmup: int, lr: float) -> list[tuple[int, float]]:
    """The loop of references/detection: train.py steps the epochs, engine.py the warm-up, in epoch 0 only."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    by_epoch = MultiStepLR(optimizer, [1, 2], gamma=0.1)
    by_step = LinearLR(optimizer, start_factor=1 / 1000, total_iters=warmup)
    seen = []
    for epoch in range(epochs):
        for _ in range(steps):
            seen.append((epoch, optimizer.param_groups[0]["lr"]))
            optimizer.step()
            if epoch == 0:
                by_step.step()
        by_epoch.step()
    return seen


def rates_of_task(folder: Path, *, epochs: int, checkpoint: Path | None = None, **options: Any) -> list[Any]:
    rates = Rates()
    trainer = small_trainer(folder, max_epochs=epochs, limit_val_batches=0)
    trainer.callbacks.insert(0, rates)  # type: ignore[attr-defined]
    data = DigitsDataModule(image_size=8, batch_size=16, limit=64)
    trainer.fit(small_task(**options), data, ckpt_path=checkpoint, weights_only=True)
    return rates.seen


def test_a_warm_up_in_steps_is_that_of_torchvision(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "step", "milestones": [1, 2], "warmup_steps": 3}
    found = rates_of_task(tmp_path, epochs=3, **options)
    assert len(found) == 12
    assert found[0] == (0, pytest.approx(0.05 / 1000))
    assert found == [(epoch, pytest.approx(rate)) for epoch, rate in rates_of_torchvision(3, 4, 3, lr=0.05)]


def test_resuming_in_the_warm_up_keeps_the_rate(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "step", "milestones": [2], "warmup_steps": 6}
    whole = rates_of_task(tmp_path / "whole", epochs=3, **options)
    first = rates_of_task(tmp_path / "parts", epochs=1, **options)
    rest = rates_of_task(tmp_path / "rest", epochs=3, checkpoint=tmp_path / "parts" / "last.ckpt", **options)
    assert first + rest == whole
    assert [rate for _, rate in whole] == pytest.approx(
        [0.05 * (0.001 + 0.999 * step / 6) for step in range(6)] + [0.05] * 2 + [0.005] * 4
    )


def test_accumulated_batches_are_one_step_of_the_warm_up(tmp_path: Path) -> None:
    rates = Rates()
    trainer = small_trainer(tmp_path, limit_val_batches=0, accumulate_grad_batches=2, callbacks=[rates])
    trainer.fit(small_task(warmup_steps=2), DigitsDataModule(image_size=8, batch_size=16, limit=64))
    assert [rate for _, rate in rates.seen] == pytest.approx([0.00005, 0.00005, 0.025025, 0.025025])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 5, "warmup_epochs": 1}, "Give warmup_epochs or warmup_steps, not both, got 1 and 5"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
    ],
)
def test_a_warm_up_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_task(**options)
