"""Tasks, units and data of the user's own, named by an option or by the config of a run, and by nothing else."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dia_lightning.tasks import ClassificationTask, load_task
from tests.cli.conftest import BARE, CONFIG, call

PARTS = """\
import torch
from torch import nn
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask

class Gate(nn.Module):
    def __init__(self, channels, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full([channels], scale))

    def forward(self, features, state):
        return torch.sigmoid(self.weight).view(1, -1, 1, 1).expand(len(features), -1, 1, 1), state

def make_gate(channels, scale: float = 1.0):
    return Gate(channels, scale)

class Own(ClassificationTask):
    def __init__(self, depth: int = 11, **options):
        super().__init__("cifar_resnet", backbone_args={"depth": depth}, **options)

class Small(DigitsDataModule):
    def __init__(self, size: int = 8):
        super().__init__(image_size=size, batch_size=10, limit=20, num_workers=0)
"""
UNIT = ["--model.attention", "parts_of_mine.Gate", "--model.attention_args={'scale': 0.5}"]
TASK = ["--model", "parts_of_mine.Own", "--model.depth", "20", "--model.attention", "parts_of_mine.make_gate"]
DATA = ["--data", "parts_of_mine.Small"]
LAST = "runs/tiny/version_0/checkpoints/last.ckpt"


def forget() -> None:
    from dia_lightning.attention import _registry

    sys.modules.pop("parts_of_mine", None)
    for name in [name for name in _registry._BUILDERS if "." in name]:
        del _registry._BUILDERS[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two working folders with `parts_of_mine.py`: one run with a unit, one with a task and data too."""
    folder = tmp_path_factory.mktemp("own")
    for name, options in (("unit", UNIT), ("task", [*TASK, *DATA])):
        (folder / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder / name)
            Path("tiny.yaml").write_text(CONFIG)
            Path("bare.yaml").write_text(BARE)
            Path("parts_of_mine.py").write_text(PARTS)
            call("fit", "-c", "tiny.yaml", *options)
    return folder


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Goes to a copy of one of them, where nothing of the user's own is imported any more."""

    def go(name: str) -> Path:
        shutil.copytree(folder / name, tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        forget()
        return tmp_path / name

    yield go
    forget()


def test_a_unit_of_ones_own_reloads_by_its_path(
    place: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place("unit")
    with pytest.raises(ValueError, match=r"'parts_of_mine\.Gate' is not registered.* attention=Gate, or register"):
        load_task(LAST)
    assert "parts_of_mine" not in sys.modules
    call("test", "--ckpt_path", "last", "--data.batch_size", "5")
    assert "test/acc" in capsys.readouterr().out
    forget()
    call("export", LAST, "unit.safetensors")
    stored = torch.load(LAST, weights_only=True)["state_dict"]
    assert torch.equal(load_file("unit.safetensors")["layer1.0.dia.weight"], stored["backbone.layer1.0.dia.weight"])
    assert isinstance(load_task(LAST), ClassificationTask)  # it is registered by now


def test_a_path_in_a_checkpoint_imports_nothing(
    place: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place("unit")
    with pytest.raises(SystemExit):
        call("test", "-c", "bare.yaml", "--model.backbone", "cifar_resnet", "--ckpt_path", LAST)
    assert "The attention of the checkpoint is parts_of_mine.Gate, and a class is not imp" in capsys.readouterr().err
    Path("runs/tiny/version_0/config.yaml").unlink()
    with pytest.raises(SystemExit):
        call("export", LAST, "unit.safetensors")
    assert "parts_of_mine" not in sys.modules


@pytest.mark.parametrize("command", ["analyze last --images 20", "sites last", "predict --ckpt_path last"])
def test_commands_know_a_task_and_data_of_ones_own_by_the_config_of_the_run(
    place: Callable[[str], Path], command: str
) -> None:
    place("task")
    call(*command.split())
    task = sys.modules["parts_of_mine"]
    assert task.Own.__mro__[1] is ClassificationTask


def test_an_exported_task_of_ones_own_has_the_weights_of_its_checkpoint(place: Callable[[str], Path]) -> None:
    place("task")
    call("export", "last", "own.safetensors")
    stored = torch.load(LAST, weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[f"backbone.{name}"]) for name, value in load_file("own.safetensors").items())


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("parts_of_mine.Gat", "--model.attention: parts_of_mine has no class 'Gat'. Did you mean 'Gate'?"),
        ("not_of_mine.Gate", "--model.attention: cannot import not_of_mine.Gate: No module named 'not_of_mine'."),
        ("parts_of_mine.__name__", "parts_of_mine.__name__ is no class of attention modules, but 'parts_of_mine'."),
    ],
)
def test_a_wrong_path_is_one_line(fails: Callable[..., str], attention: str, message: str) -> None:
    Path("parts_of_mine.py").write_text(PARTS)
    forget()
    assert message in fails("fit", "-c", "tiny.yaml", "--model.attention", attention)
    forget()


def test_the_config_of_the_run_comes_below_the_command_line(run_folder: Path, fails: Callable[..., str]) -> None:
    assert "--data.batch_siz: " in fails("test", "--ckpt_path", "last", "--data.batch_siz", "5")
    assert "lr must be a positive number" in fails(
        "validate", f"--ckpt_path={run_folder}/checkpoints/last.ckpt", "--model.lr=-1"
    )
    (run_folder / "config.yaml").unlink()
    assert "--data, --model missing: give a config" in fails("test", "--ckpt_path", "last")
