"""A training that was stopped and goes on ends with the checkpoint of one that was not, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor

from dia_lightning.callbacks import EMA
from dia_lightning.datamodules import DigitScenesDataModule, DigitsDataModule
from dia_lightning.tasks import ClassificationTask, DiffusionTask
from tests.tasks.tiny_detection import tiny_task
from tests.two_processes import on_two_processes

NETWORK = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.5}
PATHS = {"best_model_path", "last_model_path", "kth_best_model_path", "best_k_models"}
EPOCH_END, MID_EPOCH, LAST_BATCH = "epoch-step=3.ckpt", "step-step=4.ckpt", "step-step=3.ckpt"


def digits(workers: int, **options: Any) -> DigitsDataModule:
    return DigitsDataModule(image_size=8, batch_size=8, limit=24, num_workers=workers, **options)


def build(kind: str, workers: int, schedule: Any = "cosine") -> tuple[Any, Any]:
    """A task and its data, with as much chance as they can have."""
    if kind == "detection":
        return tiny_task(num_classes=10), DigitScenesDataModule(
            image_size=64, batch_size=2, limit=6, augment="ssd", num_workers=workers
        )
    if kind == "diffusion":
        denoiser = DiffusionTask("unet", 10, image_shape=[3, 8, 8], backbone_args=NETWORK, lr=0.01)
        return denoiser, digits(workers, augment="flips", pixel_range="symmetric")
    task = ClassificationTask(
        "cifar_resnet", 10, backbone_args={"depth": 11}, attention="dia-lstm", schedule=schedule, image_shape=[3, 8, 8]
    )
    sampling: Any = "balanced" if kind == "balanced" else "shuffle"
    return task, digits(workers, augment="strong", mixup=0.5, cutmix=0.5, sampling=sampling)


def keep(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, enable_version_counter=False, **options)


class KeepEnd(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def train(
    folder: Path,
    kind: str = "classification",
    *,
    workers: int = 0,
    start: str | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the checkpoint at the end of a training of two epochs with three batches each, or of the rest of it."""
    seed_everything(3, workers=True, verbose=False)
    task, data = build(kind, workers, options.pop("schedule", "cosine"))
    data.batch_size = batch_size or data.batch_size
    if start is not None:
        torch.rand(5)  # a program that starts again may have used random numbers before
    callbacks: list[Callback] = [
        *options.pop("callbacks", ()),
        keep(folder, filename="best", monitor="val/map" if kind == "detection" else "val/loss"),
        keep(folder, filename="step-{step}", every_n_train_steps=1, save_top_k=-1),
        keep(folder, filename="epoch-{step}", save_top_k=-1),
        KeepEnd(folder / "end.ckpt"),
    ]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(**{"accelerator": "cpu", "max_epochs": 2, "callbacks": callbacks, **quiet, **options})
    trainer.fit(task, data, ckpt_path=None if start is None else folder / start, weights_only=True)
    return dict(torch.load(folder / "end.ckpt", weights_only=True))


def differences(first: Any, second: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ, but for paths."""
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{place}: keys {first.keys() ^ second.keys()}"]
        names = [name for name in first if name not in PATHS]
        return [each for name in names for each in differences(first[name], second[name], f"{place}/{name}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [each for number, pair in pairs for each in differences(*pair, f"{place}/{number}")]
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
    else:
        same = type(first) is type(second) and first == second
    return [] if same else [f"{place}: {first!s:.60} or {second!s:.60}"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_goes_on_ends_as_a_straight_one(tmp_path: Path, workers: int) -> None:
    straight = train(tmp_path, workers=workers, callbacks=[EMA(decay=0.9)])
    for start in (EPOCH_END, MID_EPOCH, LAST_BATCH) if workers == 0 else (EPOCH_END, MID_EPOCH):
        resumed = train(tmp_path, workers=workers, start=start, callbacks=[EMA(decay=0.9)])
        assert differences(straight, resumed) == [], start


def test_workers_make_no_difference(tmp_path: Path) -> None:
    alone, helped = (train(tmp_path / str(workers), workers=workers) for workers in (0, 2))
    assert differences(alone["state_dict"], helped["state_dict"]) == []


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("step-step=2.ckpt", {"val_check_interval": 2, "check_val_every_n_epoch": None}),
        (LAST_BATCH, {"check_val_every_n_epoch": 2}),
        (EPOCH_END, {"max_epochs": -1, "max_steps": 5}),
    ],
    ids=["validation due in mid-epoch", "no validation due", "max_steps"],
)
def test_what_follows_a_batch_or_an_epoch_is_done(tmp_path: Path, start: str, options: dict[str, Any]) -> None:
    straight = train(tmp_path, **options)
    assert differences(straight, train(tmp_path, start=start, **options)) == []


def test_accumulated_gradients_go_on(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            batch_idx = args[-1]
            if trainer.current_epoch == 1 and batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    straight = train(tmp_path, accumulate_grad_batches=3, callbacks=[Save()])
    assert differences(straight, train(tmp_path, accumulate_grad_batches=3, start="between.ckpt")) == []


@pytest.mark.parametrize("kind", ["balanced", "detection", "diffusion"])
def test_other_data_and_tasks_go_on_exactly(tmp_path: Path, kind: str) -> None:
    straight = train(tmp_path, kind)
    assert differences(straight, train(tmp_path, kind, start=MID_EPOCH)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "diffusion"])
def test_two_processes_go_on_exactly(tmp_path: Path, kind: str) -> None:
    straight = train(tmp_path, kind, batch_size=4, **on_two_processes())
    assert len(straight["dia_processes"]) == 2
    assert differences(straight, train(tmp_path, kind, batch_size=4, start=MID_EPOCH, **on_two_processes())) == []


def test_metrics_of_an_epoch_count_what_was_seen_of_it_before(tmp_path: Path) -> None:
    class Scores(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.found = {name: float(value) for name, value in trainer.callback_metrics.items()}

    straight, resumed = Scores(), Scores()
    train(tmp_path, callbacks=[straight])
    train(tmp_path, start="step-step=5.ckpt", callbacks=[resumed])
    assert "train/acc" in straight.found
    assert resumed.found == straight.found


def test_checkpoints_of_before_still_resume(tmp_path: Path) -> None:
    train(tmp_path)
    old = torch.load(tmp_path / MID_EPOCH, weights_only=True)
    del old["dia_processes"], old["DigitsDataModule"]
    torch.save(old, tmp_path / "old.ckpt")
    assert train(tmp_path, start="old.ckpt")["global_step"] == 6


def test_other_batches_in_mid_epoch_are_told(tmp_path: Path) -> None:
    train(tmp_path)
    checkpoint = torch.load(tmp_path / MID_EPOCH, weights_only=True)
    checkpoint["DigitsDataModule"]["batch_size"] = 4
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match=r"after 1 batches of epoch 1 with batch_size=4 on 1 process\(es\), now .*=8"):
        train(tmp_path, start="other.ckpt")


def test_double_precision_and_a_schedule_that_watches_a_metric_go_on(tmp_path: Path) -> None:
    def plateau(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, monitor="val/loss", patience=0)

    straight = train(tmp_path, schedule=plateau, precision="64-true")
    for start in (EPOCH_END, MID_EPOCH):
        resumed = train(tmp_path, schedule=plateau, precision="64-true", start=start)
        assert differences(straight, resumed) == [], start


def test_the_rate_that_a_finder_found_stays(tmp_path: Path) -> None:
    straight = train(tmp_path, callbacks=[LearningRateFinder(num_training_steps=3)])
    with pytest.warns(UserWarning, match="LearningRateFinder is skipped"):
        resumed = train(tmp_path, callbacks=[LearningRateFinder(num_training_steps=3)], start=EPOCH_END)
    assert differences(straight, resumed) == []


def test_an_order_of_lightnings_own_is_told(tmp_path: Path) -> None:
    train(tmp_path, overfit_batches=3)
    with pytest.warns(UserWarning, match="overfit_batches=3 has an order of Lightning's own, so that epoch 1 begins"):
        train(tmp_path, start=MID_EPOCH, overfit_batches=3)
