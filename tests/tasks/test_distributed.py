"""Two processes on this machine's CPU give the numbers of one."""

from pathlib import Path

import pytest
import torch

from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import DiffusionTask
from tests.tasks.conftest import small_task, small_trainer
from tests.two_processes import on_two_processes


def test_two_processes_train_and_measure_what_one_measures(tmp_path: Path) -> None:
    # 65 images: one process gets 33, the other 32 and one image that only fills up.
    data = DigitsDataModule(image_size=8, batch_size=16, limit=65)
    task = small_task()
    trainer = small_trainer(tmp_path, max_epochs=2, **on_two_processes())
    trainer.fit(task, data)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4  # two steps per epoch, each on two processes
    measured = trainer.callback_metrics
    alone = small_task()
    (single,) = small_trainer(tmp_path).validate(
        alone, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    for name in ("val/acc", "val/acc_macro", "val/acc5", "val/loss"):
        assert measured[name].item() == pytest.approx(single[name], rel=1e-5), name


def test_two_processes_train_a_diffusion_task_and_measure_what_one_measures(tmp_path: Path) -> None:
    data = DigitsDataModule(image_size=8, channels=1, pixel_range="symmetric", batch_size=16, limit=65)
    network = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    options = {"image_shape": [1, 8, 8], "backbone_args": network, "conditional": True, "attention": "dia-lstm"}
    task = DiffusionTask("unet", 10, optimizer="adamw", lr=1e-3, **options)  # type: ignore[arg-type]
    trainer = small_trainer(tmp_path, max_epochs=2, **on_two_processes())
    trainer.fit(task, data)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    measured = trainer.callback_metrics
    alone = DiffusionTask("unet", 10, **options)  # type: ignore[arg-type]
    (single,) = small_trainer(tmp_path).validate(
        alone, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert measured["val/loss"].item() == pytest.approx(single["val/loss"], rel=1e-5)
