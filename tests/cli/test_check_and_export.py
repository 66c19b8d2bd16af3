"""The commands `check` and `export`."""

from pathlib import Path

import pytest
import torch

from dia_lightning.tasks import load_task
from tests.cli.conftest import Run
from tests.tasks.conftest import small_task, small_trainer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from dia_lightning.datamodules import DigitsDataModule

    trainer = small_trainer(tmp_path / "runs")
    trainer.fit(small_task(), DigitsDataModule(image_size=16, batch_size=32, limit=64))
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "nowhere.ckpt", "n.onnx"), "nowhere.ckpt: there is no such file"),
        (("export", "resnet164", "n.h5"), "must be one of .onnx, .pt2, .safetensors"),
        (("check", "resnet146"), "did you mean resnet164"),
        (("check", "torchvision/vgg11"), "No residual block is known in VGG"),
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
