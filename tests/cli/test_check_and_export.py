"""The commands `check` and `export`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning.models.pipelines import DIAPipeline
from dia_lightning.tasks import DiffusionTask, load_task
from tests.cli.conftest import Run
from tests.tasks.conftest import small_task, small_trainer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from dia_lightning.datamodules import DigitsDataModule

    trainer = small_trainer(tmp_path / "runs")
    trainer.fit(small_task(), DigitsDataModule(image_size=16, batch_size=32, limit=64))
    return tmp_path / "runs" / "last.ckpt"


@pytest.fixture
def diffusion_checkpoint(tmp_path: Path) -> Path:
    from dia_lightning.datamodules import DigitsDataModule

    network = {"block_out_channels": [8, 16], "layers_per_block": 1}
    task = DiffusionTask("unet", 10, image_shape=[1, 8, 8], backbone_args=network, conditional=True, attention="se")
    data = DigitsDataModule(image_size=8, channels=1, pixel_range="symmetric", batch_size=10, limit=20)
    small_trainer(tmp_path / "runs").fit(task, data)
    return tmp_path / "runs" / "last.ckpt"


def test_a_named_network_is_checked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("check", "torchvision/resnet18", "--image_size", "64")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 15
    assert all(" OK" in line for line in lines)


def test_the_network_of_a_checkpoint_is_checked(run: Run, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("check", "last", "--runs", str(checkpoint.parent))
    assert "3 sites, 3 units" in capsys.readouterr().out


def test_the_network_of_a_checkpoint_is_exported(
    run: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export", str(checkpoint), str(tmp_path / "network.pt2"))
    printed = capsys.readouterr().out
    assert "largest difference" in printed
    assert "[B, 3, 16, 16]" not in printed.splitlines()[0]
    images = torch.randn(3, 3, 16, 16)
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    torch.testing.assert_close(loaded(images), load_task(checkpoint)(images))


def test_a_diffusion_task_becomes_a_folder_for_diffusers(
    run: Run, diffusion_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export", "last", "my_model", "--runs", str(diffusion_checkpoint.parent))
    summary, snippet = capsys.readouterr().out.split("\n\n")
    assert float(summary.rpartition(" ")[2]) < 1e-5
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert len(names["images"]) == 4
    pipeline = DIAPipeline.from_pretrained(tmp_path / "my_model")
    task = load_task(diffusion_checkpoint)
    assert isinstance(task, DiffusionTask)
    images = pipeline(class_labels=["3", 7], num_inference_steps=4, guidance_scale=1.5, output_type="pt").images
    assert torch.equal(images, task.sample(2, classes=[3, 7], steps=4, guidance=1.5))


def test_a_diffusion_task_needs_a_new_folder(
    fails: Callable[..., str], diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for path, message in {
        "my_model.onnx": "is written to a folder, got 'my_model.onnx'. Omit .onnx: 'my_model'",
        "runs": "'runs' exists already, and nothing is overwritten. Give a new folder",
        "mine.txt/model": "mine.txt/model cannot be written (File exists). Give another path",
    }.items():
        assert message in fails("export", str(diffusion_checkpoint), path)


def test_the_size_of_generated_images_is_not_a_choice(
    fails: Callable[..., str], diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    message = fails("export", str(diffusion_checkpoint), "my_model", "--image_size", "16")
    assert "--image_size 16: a diffusion task makes images of the size that it was trained with, 8x8" in message
    assert not (tmp_path / "my_model").exists()


def test_check_refuses_a_diffusion_task(fails: Callable[..., str], diffusion_checkpoint: Path) -> None:
    message = fails("check", str(diffusion_checkpoint))
    assert "last.ckpt must hold a ClassificationTask, but holds a DiffusionTask" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "nowhere.ckpt", "n.onnx"), "nowhere.ckpt: there is no such file"),
        (("export", "resnet164", "n.h5"), "must be one of .onnx, .pt2, .safetensors"),
        (("export", "resnet164", "model"), "as in 'network.onnx'; folders are for diffusion tasks"),
        (("check", "resnet146"), "Did you mean 'resnet164'"),
        (("check", "torchvision/vgg11"), "VGG has no residual branch"),
        (("check", "resnet164", "--attention", "dia"), "Did you mean 'dia-lstm'"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
