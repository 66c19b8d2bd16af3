"""Trainings of four batches per epoch that take no time, and the rate of each of their optimizer steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dia_lightning.tasks import ClassificationTask


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, features: Tensor) -> Tensor:
        branch: Tensor = self.bn(self.conv(features)).relu()
        return features + branch


class Network(nn.Module):
    """A residual network: stem, two blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.norm(self.stem(images)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def tiny_task(**options: Any) -> ClassificationTask:
    arguments: dict[str, Any] = {"image_shape": [1, 4, 4], "lr": 0.05, **options}
    return ClassificationTask(Network(), 3, **arguments)


def loader(batches: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * batches, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(2 * batches) % 3), batch_size=2)


class StepRates(Callback):
    """Notes the learning rates of all groups at every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])

    @property
    def first(self) -> list[float]:
        return [rates[0] for rates in self.seen]


def fit(task: Any, *, callbacks: Sequence[Callback] = (), ckpt_path: Path | None = None, **options: Any) -> StepRates:
    """Train, and return the rates."""
    rates = StepRates()
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [rates, *callbacks],
    }
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(task, loader(), loader(1), ckpt_path=ckpt_path, weights_only=True)
    return rates
