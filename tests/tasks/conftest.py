"""A small real job: digits at 8x8 pixels and a network of eleven layers."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask


@pytest.fixture
def digits() -> DigitsDataModule:
    return DigitsDataModule(image_size=8, batch_size=32, limit=65)


def small_task(**options: Any) -> ClassificationTask:
    arguments: dict[str, Any] = {"backbone_args": {"depth": 11}, "attention": "dia-lstm", "lr": 0.05, **options}
    return ClassificationTask(arguments.pop("backbone", "cifar_resnet"), arguments.pop("num_classes", 10), **arguments)


def small_trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "callbacks": [ModelCheckpoint(dirpath=folder, save_last=True)],
    }
    return Trainer(**{**defaults, **options})


class Given(LightningDataModule):
    """Serves ready-made batches."""

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class Rates(Callback):
    """Notes the learning rate and the epoch of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.seen.append((trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"]))
