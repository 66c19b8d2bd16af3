"""A batch that is accumulated in parts, or split among processes, trains as the whole one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.models import get_model
from dia_lightning.tasks import ClassificationTask
from tests.two_processes import on_two_processes


def without_batch_norm() -> nn.Module:
    """A network whose images know nothing of each other."""
    network = get_model("cifar_resnet", depth=11, num_classes=10)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network


class SeededDigits(DigitsDataModule):
    training_seed = 1  # processes that were started before know nothing of this one's


def trained(folder: Path, batch_size: int, **options: Any) -> dict[str, Tensor]:
    seed_everything(1, workers=True, verbose=False)
    task = ClassificationTask(without_batch_norm(), 10, attention="dia-lstm", image_shape=[3, 8, 8])
    data = SeededDigits(image_size=8, batch_size=batch_size, limit=48, num_workers=0, augment="strong")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        **quiet, accelerator="cpu", max_epochs=2, limit_val_batches=0, default_root_dir=folder, precision=64, **options
    )
    trainer.fit(task, data)
    (checkpoint,) = folder.rglob("*.ckpt")
    weights: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return weights


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, on_two_processes()], ids=["accumulated", "two processes"]
)
def test_half_batches_train_as_whole_ones(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trained(tmp_path / "whole", 16)
    halves = trained(tmp_path / "halves", 8, **options)
    for name, weight in whole.items():
        torch.testing.assert_close(halves[name], weight, rtol=1e-9, atol=1e-12, msg=name)
