"""A task and a datamodule of a few kilobytes that keep the contracts the callbacks rely on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassConfusionMatrix

NAMES = ["cat", "dog, small", "owl"]


class TinyTask(LightningModule):
    """A linear classifier of 8x8 images, with a batch norm for the sake of its buffers."""

    def __init__(self, num_classes: int = 3, lr: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, num_classes))
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.class_names: list[str] | None = None
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        outputs = self.predict_step((batch[0], batch[2]), batch_idx)
        accuracy = (outputs["probabilities"].argmax(1) == batch[1]).float().mean()
        self.log("val/acc", accuracy, on_epoch=True)
        return outputs

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        outputs = self.predict_step((batch[0], batch[2]), batch_idx)
        real = batch[2] >= 0
        self.confusion.update(outputs["probabilities"][real], batch[1][real])
        return outputs

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        return {"index": batch[1], "probabilities": self.net(batch[0]).softmax(1)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class _Rows(Dataset[tuple[Any, ...]]):
    def __init__(self, *columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return tuple(column[row] for column in self.columns)


class TinyData(LightningDataModule):
    """Images whose class is the brightest third of the image, with values from -1 to 1.

    With `padding`, the last samples of val, test and predict carry the index -1.
    """

    def __init__(
        self, samples: int = 24, padding: int = 0, batch_size: int = 4, predict_folder: str | None = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(samples, 1, 8, 8, generator=generator) * 2 - 1
        self.labels = self.images.flatten(1)[:, :63].reshape(-1, 3, 21).mean(2).argmax(1)
        self.index = torch.arange(samples)
        self.index[samples - padding :] = -1
        self.batch_size = batch_size
        self.predict_folder = predict_folder
        self.class_names = NAMES
        self.num_classes = 3

    def denormalize(self, images: Tensor) -> Tensor:
        return (images + 1) / 2

    def sample_name(self, index: int) -> str:
        return f"{self.predict_folder or 'test'}/{index}"

    def _loader(self, *columns: Tensor) -> DataLoader[tuple[Any, ...]]:
        return DataLoader(_Rows(*columns), batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader[tuple[Any, ...]]:
        return self._loader(self.images, self.labels)

    def val_dataloader(self) -> DataLoader[tuple[Any, ...]]:
        return self._loader(self.images, self.labels, self.index)

    def test_dataloader(self) -> DataLoader[tuple[Any, ...]]:
        return self._loader(self.images, self.labels, self.index)

    def predict_dataloader(self) -> DataLoader[tuple[Any, ...]]:
        return self._loader(self.images, self.index)


def tiny_trainer(
    folder: Path, *callbacks: Callback, logger: Logger | Sequence[Logger] | bool = False, **options: Any
) -> Trainer:
    """Return a quiet CPU trainer whose run folder is `folder`, for one epoch without checkpoints."""
    settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 1, **options}
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=logger,
        accelerator="cpu",
        devices=settings.pop("devices", 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
