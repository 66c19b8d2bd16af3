"""Learning rates, epoch by epoch, against hand-written numbers."""

import math

import pytest
import torch
from torch.optim import SGD

from dia_lightning.tasks._optimizers import make_schedule


def rates(epochs: int, name: str, warmup_epochs: int = 0, **options: object) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = {"milestones": [], "gamma": 0.1, "max_epochs": epochs, "warmup_epochs": warmup_epochs, **options}
    schedule = make_schedule(optimizer, name, **arguments)  # type: ignore[arg-type]
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_step_lowers_the_rate_when_the_epoch_counted_from_zero_is_a_milestone() -> None:
    # As in the authors' script: `if epoch in schedule: lr *= gamma`, before the epoch.
    assert rates(6, "step", milestones=[2, 4], gamma=0.1) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


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
