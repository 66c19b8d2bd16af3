"""The rate of every optimizer step against closed forms, wherever the rate comes from and however training ends."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.tuner.tuning import Tuner
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchPlateau
from torch.utils.data import DataLoader

from dia_lightning.tasks._schedule import Curve
from tests.tasks.tiny_training import StepRates, fit, loader, tiny_task

LR = 0.05


def cosine(part: float) -> float:
    return (1 + math.cos(math.pi * part)) / 2


def rise(step: int, steps: int) -> float:
    return 0.001 + 0.999 * min(step / steps, 1)


# four batches are an epoch: options of the task, of the trainer, number of steps, share of the rate at a step
TABLE: list[tuple[dict[str, Any], dict[str, Any], int, Callable[[int], float]]] = [
    ({"schedule": "cosine"}, {"max_epochs": 3}, 12, lambda s: cosine(s // 4 / 3)),
    ({"schedule": "cosine"}, {"max_epochs": 3, "max_time": {"hours": 1}}, 12, lambda s: cosine(s // 4 / 3)),
    ({"schedule": "cosine"}, {"max_epochs": 3, "max_steps": 12}, 12, lambda s: cosine(s // 4 / 3)),
    ({"schedule": "cosine"}, {"max_epochs": 3, "max_steps": 6}, 6, lambda s: cosine(s / 6)),
    ({"schedule": "cosine"}, {"max_epochs": -1, "max_steps": 6}, 6, lambda s: cosine(s / 6)),
    ({"schedule": "cosine"}, {"max_steps": 3, "accumulate_grad_batches": 3}, 3, lambda s: cosine(s / 3)),
    ({"schedule": "cosine"}, {"max_epochs": 2, "accumulate_grad_batches": 3}, 4, lambda s: cosine(s // 2 / 2)),
    ({"schedule": "cosine", "schedule_interval": "step"}, {"max_epochs": 2}, 8, lambda s: cosine(s / 8)),
    (
        {"schedule": "cosine", "warmup_epochs": 1},
        {"max_epochs": 3},
        12,
        lambda s: 0.5 if s < 4 else cosine((s // 4 - 1) / 2),
    ),
    (
        {"schedule": "cosine", "warmup_epochs": 1},
        {"max_steps": 7},
        7,
        lambda s: (s + 1) / 5 if s < 4 else cosine((s - 4) / 3),
    ),
    ({"schedule": "cosine", "warmup_steps": 3}, {"max_steps": 6}, 6, lambda s: rise(s, 3) * cosine(s / 6)),
    ({"schedule": "constant", "warmup_epochs": 2}, {"max_steps": 10}, 10, lambda s: min(1, (s // 4 + 1) / 3)),
    ({"schedule": "constant", "warmup_steps": 9}, {"max_epochs": 1}, 4, lambda s: rise(s, 9)),
    (
        {"schedule": "step", "milestones": [1], "warmup_steps": 6},
        {"max_epochs": 2},
        8,
        lambda s: rise(s, 6) * 0.1 ** (s // 4),
    ),
    (
        {"schedule": "step", "milestones": [2, 3], "schedule_interval": "step", "gamma": 0.5},
        {"max_epochs": 1},
        4,
        lambda s: [1, 1, 0.5, 0.25][s],
    ),
    ({"schedule": partial(StepLR, step_size=1)}, {"max_epochs": 2}, 8, lambda s: 0.1 ** (s // 4)),
    (
        {"schedule": partial(LambdaLR, lr_lambda=lambda e: 1 / (1 + e)), "warmup_epochs": 2},
        {"max_epochs": 4},
        16,
        lambda s: min(1, (s // 4 + 1) / 3) / (1 + s // 4),
    ),
    (
        {"schedule": partial(CosineAnnealingLR, T_max=8), "schedule_interval": "step", "warmup_steps": 5},
        {"max_epochs": 2},
        8,
        lambda s: rise(s, 5) * cosine(s / 8),
    ),
    (
        {"schedule": partial(StepLR, step_size=1, gamma=0.5), "schedule_interval": "step", "schedule_frequency": 3},
        {"max_epochs": 2},
        8,
        lambda s: 0.5 ** (s // 3),
    ),
    (
        {"schedule": partial(StepLR, step_size=1, gamma=0.5), "schedule_frequency": 2},
        {"max_epochs": 3},
        12,
        lambda s: 0.5 ** (s // 8),
    ),
    (
        {"schedule": lambda o: SequentialLR(o, [LinearLR(o, 0.5, total_iters=2), StepLR(o, 1)], [2])},
        {"max_epochs": 4},
        16,
        lambda s: [0.5, 0.75, 1, 0.1][s // 4],
    ),
]


class Finds(Callback):
    """Finds a rate as Lightning's finder does, which writes it to the task and into all groups."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.lr = self.lr
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.lr


@pytest.mark.parametrize(("options", "training", "steps", "share"), TABLE)
def test_the_rate_of_every_step_is_the_documented_one(
    options: dict[str, Any], training: dict[str, Any], steps: int, share: Callable[[int], float]
) -> None:
    expected = [share(step) for step in range(steps)]
    training = {**training, "limit_val_batches": 0}
    assert fit(tiny_task(**options), **training).first == pytest.approx([LR * each for each in expected])
    # a rate that was found, in place of one that a callable brings
    own = tiny_task(**options, optimizer=partial(SGD, lr=0.3))
    found = fit(own, callbacks=[Finds(0.002)], **training)
    assert found.first == pytest.approx([0.002 * each for each in expected])


def test_the_rate_that_a_callable_brings_is_the_full_one() -> None:
    task = tiny_task(optimizer=partial(SGD, lr=0.3), schedule="cosine", warmup_steps=2)
    found = fit(task, max_steps=4, limit_val_batches=0)
    assert found.first == pytest.approx([0.3 * rise(step, 2) * cosine(step / 4) for step in range(4)])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_what_changes_with_the_epochs_is_accumulated(schedule: str) -> None:
    accumulate = GradientAccumulationScheduler({0: 1, 1: 2})
    task = tiny_task(schedule=schedule, schedule_interval="step", warmup_steps=2)
    found = fit(task, max_epochs=2, callbacks=[accumulate]).first
    shape = [cosine(step / 6) if schedule == "cosine" else 1 for step in range(6)]
    assert found == pytest.approx([LR * rise(step, 2) * shape[step] for step in range(6)])


@pytest.mark.parametrize("options", [{}, {"optimizer": partial(AdamW, lr=3e-4)}])
def test_the_rate_of_the_learning_rate_finder_is_the_full_one(tmp_path: Path, options: dict[str, Any]) -> None:
    training: dict[str, Any] = {"max_epochs": 5, "default_root_dir": tmp_path}
    finder = LearningRateFinder(num_training_steps=14, max_lr=0.01)
    task = tiny_task(schedule="cosine", warmup_steps=3, attention="se", attention_lr=0.5, **options)
    found = fit(task, callbacks=[finder], **training)
    assert finder.optimal_lr is not None
    lr = finder.optimal_lr.suggestion()
    assert lr is not None
    assert task.lr == lr
    shares = [rise(step, 3) * cosine(step // 4 / 5) for step in range(20)]
    assert found.seen == [pytest.approx([lr * each, lr * each * 0.5]) for each in shares]


def test_the_rate_of_the_tuner_is_that_of_the_training_after_it(tmp_path: Path) -> None:
    for options in ({}, {"optimizer": partial(AdamW, lr=3e-4)}):
        task = tiny_task(warmup_steps=3, **options)
        trainer = Trainer(
            accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False, max_epochs=9
        )
        finder = Tuner(trainer).lr_find(task, loader(), num_training=14, max_lr=0.01)
        assert finder is not None
        lr = finder.suggestion()
        assert lr is not None
        assert fit(task, max_epochs=1).first == pytest.approx([lr * rise(step, 3) for step in range(4)])


class FindsLater(Finds):
    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            super().on_fit_start(trainer, pl_module)


@pytest.mark.parametrize("schedule", ["step", partial(MultiStepLR, milestones=[1], gamma=0.5)])
def test_a_rate_that_is_found_in_the_middle_goes_through_the_schedule(schedule: Any) -> None:
    options = {"milestones": [1], "gamma": 0.5} if schedule == "step" else {}
    task = tiny_task(schedule=schedule, warmup_steps=6, **options)
    found = fit(task, callbacks=[FindsLater(0.002)], max_epochs=3)
    shares = [rise(step, 6) for step in range(12)]
    assert found.first == pytest.approx([LR * each for each in shares[:4]] + [0.001 * each for each in shares[4:]])


def test_one_cycle_has_its_own_rates_and_the_factors_of_groups() -> None:
    one_cycle = partial(OneCycleLR, max_lr=0.4, total_steps=8)
    task = tiny_task(schedule=one_cycle, schedule_interval="step", attention="se", attention_lr=0.1)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    reference = one_cycle(optimizer)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 8:
            reference.step()
    with pytest.warns(UserWarning, match="OneCycleLR sets its own rates, so the rate that was found, 0.002"):
        found = fit(task, callbacks=[Finds(0.002)], max_epochs=2)
    assert found.seen == [pytest.approx([rate, 0.1 * rate]) for rate in expected]


class Halves(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] /= 2


@pytest.mark.parametrize("schedule", ["step", partial(MultiStepLR, milestones=[1], gamma=0.5)])
def test_a_rate_that_a_callback_sets_is_followed(schedule: Any) -> None:
    options = {"milestones": [1], "gamma": 0.5} if schedule == "step" else {}
    task = tiny_task(schedule=schedule, warmup_steps=3, attention="se", attention_lr=0.1, **options)
    found = fit(task, callbacks=[Halves()], max_epochs=2)
    expected = [LR * rise(step, 3) * (0.5 if step > 1 else 1) * 0.5 ** (step // 4) for step in range(8)]
    assert found.first == pytest.approx(expected)
    assert [rates[1] for rates in found.seen] == pytest.approx([0.1 * rate for rate in expected])


@pytest.mark.parametrize(
    ("rates", "attention_lr", "last"),
    [(0.01, 0.1, [0.01, 0.001]), (0.01, 0, [0.01, 0]), ([0.01, 0.02], 0.1, [0.01, 0.02])],
)
def test_weight_averaging_of_lightning_has_its_own_rates_and_the_factors_of_groups(
    rates: Any, attention_lr: float, last: list[float]
) -> None:
    averaging = StochasticWeightAveraging(swa_lrs=rates, swa_epoch_start=1, annealing_epochs=1)
    task = tiny_task(attention="se", attention_lr=attention_lr)
    found = fit(task, callbacks=[averaging], max_epochs=4)
    assert found.seen[-1] == pytest.approx(last)


class Data(LightningDataModule):
    """16 images, two in a batch unless a finder says otherwise."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(loader(8).dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


def test_a_schedule_in_steps_counts_those_that_the_batch_size_finder_leaves() -> None:
    task = tiny_task(schedule="cosine", schedule_interval="step", warmup_epochs=1, attention="se", attention_lr=0.1)
    rates = StepRates()
    callbacks = [rates, BatchSizeFinder(max_trials=2, steps_per_trial=1)]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=3, callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(task, Data())
    expected = [LR * Curve("cosine", "step", warmup=4, length=12)(step) for step in range(12)]
    assert rates.first[-12:] == pytest.approx(expected)
    assert [step[1] for step in rates.seen[-12:]] == pytest.approx([0.1 * rate for rate in expected])


# ---- ReduceLROnPlateau


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": partial(ReduceLROnPlateau, monitor="val/loss", patience=0, factor=0.5, threshold=9.0)},
        {
            "schedule": partial(TorchPlateau, patience=0, factor=0.5, threshold=9.0),
            "schedule_monitor": "val/loss",
        },
        {
            "schedule": partial(TorchPlateau, patience=0, factor=0.5, threshold=9.0),
            "schedule_monitor": "train/acc",
        },
    ],
)
def test_a_plateau_lowers_the_rate_and_resumes_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**options, "warmup_steps": 6}
    shares = [rise(step, 6) * 0.5 ** max(0, step // 4) for step in range(16)]  # no epoch is better by a factor of 9
    whole = fit(tiny_task(**options), max_epochs=4)
    assert whole.first == pytest.approx([LR * each for each in shares])
    saves: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(tiny_task(**options), max_epochs=2, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], **saves)
    rest = fit(tiny_task(**options), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert rest.first == whole.first[8:]


def test_a_plateau_waits_for_the_first_validation() -> None:
    task = tiny_task(schedule=partial(ReduceLROnPlateau, monitor="val/loss", patience=0, factor=0.5, threshold=9.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit(task, max_epochs=4, check_val_every_n_epoch=2)
    assert found.first == pytest.approx([LR] * 8 + [LR / 2] * 4 + [LR / 4] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": TorchPlateau}, "ReduceLROnPlateau needs a metric to watch. Set schedule_monitor"),
        (
            {"schedule": TorchPlateau, "schedule_monitor": "val/los"},
            r"watches 'val/los', which is not logged. Logged: train/acc, train/loss, val/acc, val/acc_macro, ",
        ),
        (
            {"schedule": partial(ReduceLROnPlateau, monitor="a"), "schedule_monitor": "b"},
            "schedule_monitor is 'b', but ReduceLROnPlateau has 'a'",
        ),
        ({"schedule": partial(StepLR, step_size=1), "schedule_monitor": "a"}, "schedule_monitor is for Reduce"),
        ({"schedule": lambda optimizer: None}, "schedule must return a torch LRScheduler, got a NoneType"),
        ({"schedule_monitor": "val/loss"}, "schedule_monitor is for a callable, but schedule='constant'"),
        ({"schedule_frequency": 2}, "schedule_frequency is for a callable, but schedule='constant', got 2"),
        ({"schedule_interval": "batch"}, "schedule_interval must be 'epoch' or 'step', got 'batch'"),
    ],
)
def test_a_schedule_that_cannot_be_stepped_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tiny_task(**options), max_epochs=1)


def test_a_cosine_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule='cosine' needs trainer.max_epochs or trainer.max_steps"):
        fit(tiny_task(schedule="cosine"), max_epochs=-1, max_time={"seconds": 20})


# ---- warnings


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        ({"warmup_steps": 4}, {"max_epochs": 1}, "Training ends after 4 steps, within the warm-up of 4"),
        ({"warmup_steps": 9}, {"max_steps": 3}, "Training ends after 3 steps, within the warm-up of 9"),
        ({"warmup_epochs": 2}, {"max_epochs": 1}, "Training ends after 1 epochs, within the warm-up of 2"),
    ],
)
def test_a_warm_up_longer_than_the_training_is_warned_of(
    options: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        fit(tiny_task(**options), **training)


def test_resuming_says_which_rate_counts(tmp_path: Path) -> None:
    saves: dict[str, Any] = {"callbacks": [ModelCheckpoint(tmp_path, save_last=True)], "enable_checkpointing": True}
    fit(tiny_task(), max_epochs=1, **saves)
    with pytest.warns(UserWarning, match=r"lr is 0.2, but the rate of the checkpoint, 0.05, is used"):
        found = fit(tiny_task(lr=0.2), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert found.first == [LR] * 4


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_checkpoints_with_schedules_of_torch_go_on(tmp_path: Path, schedule: str, warmup_epochs: int) -> None:
    """As version 0.1 wrote them: the state of what torch had for the schedule."""
    options = {"milestones": [2], "gamma": 0.5} if schedule == "step" else {}
    task = partial(tiny_task, schedule=schedule, warmup_epochs=warmup_epochs, **options)
    whole = fit(task(), max_epochs=4, limit_val_batches=0)
    saves: dict[str, Any] = {"callbacks": [ModelCheckpoint(tmp_path, save_last=True)], "enable_checkpointing": True}
    fit(task(), max_epochs=1, limit_val_batches=0, **saves)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    main: Any = {  # type: ignore[no-untyped-call]
        "step": lambda: MultiStepLR(optimizer, [2 - warmup_epochs], 0.5),
        "cosine": lambda: CosineAnnealingLR(optimizer, 4 - warmup_epochs),
        "constant": lambda: MultiStepLR(optimizer, []),
    }[schedule]()
    if warmup_epochs:
        main = SequentialLR(optimizer, [LinearLR(optimizer, 0.5, total_iters=1), main], [1])
    optimizer.step()
    main.step()
    checkpoint["lr_schedulers"] = [main.state_dict()]
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = optimizer.param_groups[0]["lr"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    rest = fit(task(), max_epochs=4, limit_val_batches=0, ckpt_path=tmp_path / "old.ckpt")
    assert rest.first == pytest.approx(whole.first[4:])
