"""Whatever file stands where a checkpoint should, every command says in one line what it is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning._checkpoint_kind import WrongCheckpointError
from dia_lightning.tasks import ClassificationTask, load_task
from tests.cli.conftest import call

Change = Callable[[dict[str, Any]], Any]


def with_hyper_parameters(**changed: Any) -> Change:
    return lambda content: {**content, "hyper_parameters": {**content["hyper_parameters"], **changed}}


def of_another_module(content: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in content.items() if not name.startswith("dia_")}
    return {**kept, "state_dict": {"layer.weight": torch.zeros(2, 2)}, "hyper_parameters": {"lr": 0.1}}


#: A file made of a good checkpoint, and what is said of it by commands that load a task; the last only by some.
FILES: dict[str, tuple[Change, str]] = {
    "weights": (lambda content: content["state_dict"], "it holds only weights"),
    "nested": (lambda content: {"model": content["state_dict"]}, "it holds weights written by another program"),
    "empty": (lambda content: {}, "it holds an empty dictionary"),
    "list": (lambda content: [1], "it holds a list"),
    "tensor": (lambda content: torch.zeros(2), "it holds a Tensor"),
    "other": (of_another_module, "it holds a checkpoint of another LightningModule"),
    "options": (lambda content: {**content, "hyper_parameters": [1]}, "hyper_parameters is missing or of another"),
    "facts": (lambda content: {**content, "dia_data": {"image_shape": "u"}}, "dia_data.image_shape is missing or"),
    "classes": (lambda content: {**content, "dia_data": {"class_names": 3}}, "dia_data.class_names is missing or"),
    "task": (lambda content: {**content, "dia_task": "DetectionTask"}, "DetectionTask"),
    "network": (with_hyper_parameters(backbone_args={"depth": 20}), "differ, the first: |makes another network than"),
    "attention": (with_hyper_parameters(attention="se"), "differ, the first: |makes another network than"),
    "weight": (lambda content: {**content, "state_dict": {"x": 1}}, "differ, the first: "),
}
WRITTEN: dict[str, tuple[bytes, str]] = {
    "html": (b"<!doctype html>", "an HTML page"),
    "text": (b"hello", "does not start like a torch file"),
}


@pytest.fixture
def files(run_folder: Path) -> dict[str, str]:
    """Wrong files, and what is said of them, by their names."""
    content = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    for name, (change, _) in FILES.items():
        torch.save(change(content), f"{name}.ckpt")
    for name, (text, _) in WRITTEN.items():
        Path(f"{name}.ckpt").write_bytes(text)
    Path("folder.ckpt").mkdir()
    expected = {f"{name}.ckpt": said for name, (_, said) in [*FILES.items(), *WRITTEN.items()]}
    return {**expected, "folder.ckpt": "folder", "/dev/null": "empty|no file, but a device", "no.ckpt": "no such file"}


@pytest.mark.parametrize("command", ["export", "sample", "analyze", "check", "sites"])
def test_commands_about_a_checkpoint_say_what_a_file_is(
    command: str, files: dict[str, str], fails: Callable[..., str]
) -> None:
    for name, said in files.items():
        line = fails(command, name, *["x.safetensors"][: command == "export"])
        assert name in line
        assert any(part in line for part in said.split("|")), line


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_commands_of_a_config_say_what_a_file_is(
    command: str, files: dict[str, str], fails: Callable[..., str]
) -> None:
    for name in ("weights.ckpt", "other.ckpt", "task.ckpt", "attention.ckpt", "folder.ckpt", "/dev/null", "html.ckpt"):
        line = fails(command, "-c", "tiny.yaml", "--ckpt_path", name)
        assert name in line
        assert any(part in line for part in files[name].split("|")), line
    assert not list(Path("runs/tiny").glob("version_1/checkpoints/*"))


def test_python_and_initial_weights_say_what_a_file_is(files: dict[str, str]) -> None:
    for name in (f"{name}.ckpt" for name in FILES):
        for load in (load_task, ClassificationTask.load_from_checkpoint):
            if name != "task.ckpt":  # whose hyper-parameters suffice to load it as what it was
                with pytest.raises(WrongCheckpointError, match=rf"{name} .*({files[name]})"):
                    load(name)
    for name in ("list.ckpt", "tensor.ckpt", "weight.ckpt"):
        with pytest.raises(WrongCheckpointError, match=f"{name}' holds no state dict"):
            ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}, init_from=name)


@pytest.mark.parametrize("key", ["callbacks", "pytorch-lightning_version", "lr_schedulers", "loops"])
def test_what_lightning_cannot_restore_is_one_line(key: str, run_folder: Path, fails: Callable[..., str]) -> None:
    path = run_folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["callbacks"] = dict.fromkeys(content["callbacks"], 3) if key == "callbacks" else content["callbacks"]
    content["loops"]["fit_loop"] |= {"epoch_progress": {"total": {}}} if key == "loops" else {}
    content |= {"pytorch-lightning_version": "x"} if key.startswith("pytorch") else {}
    content |= {"lr_schedulers": [{"a": 1}]} if key == "lr_schedulers" else {}
    torch.save(content, path)
    line = fails("fit", "-c", "tiny.yaml", "--trainer.max_epochs", "2", "--ckpt_path", str(path))
    assert "no checkpoint that this command can go on from" in line or "a custom schedule" in line


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hyper_parameters": {"identity": []}}, "do not fit its task"),
        ({"hyper_parameters": {"own_option": math.nan, "lr": math.nan}}, None),
        ({"dia_run": {"folder": {"a": 1}, "config": [1], "versions": 3}}, None),
    ],
)
def test_values_of_odd_types_are_one_line_or_left_alone(
    changed: dict[str, Any], message: str | None, run_folder: Path, fails: Callable[..., str]
) -> None:
    content = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**content, **{name: {**content[name], **values} for name, values in changed.items()}}, "x.ckpt")
    command = ("fit", "-c", "tiny.yaml", "--trainer.max_epochs", "1", "--ckpt_path", "x.ckpt")
    if message is None:
        call(*command)
    else:
        assert message in fails(*command)
