"""The README's commands run as they are written. Its Python examples are doctests."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from dia_lightning.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
COMMANDS = [shlex.split(line, comments=True)[1:] for line in SHELL if line.startswith("dia-lightning")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs, and photos to predict."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dia-lightning"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    Image.new("L", (20, 20), 128).save(tmp_path / "photos" / "grey.png")
    for name, count in {"cat": 10, "dog": 32}.items():
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 30), (6 * i, 90, 30)).save(tmp_path / "pets" / "train" / name / f"{i}.jpg")
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    return tmp_path


def test_the_two_commands_set_everything_up_themselves() -> None:
    first, second = (line for line in SHELL if line.startswith("python3 -m venv"))
    setup = "python3 -m venv .venv && .venv/bin/python -m pip install -e '.[test]' && .venv/bin/python -m "
    assert first == f"{setup}dia_lightning fit -c configs/classification/digits.yaml"
    assert second == f"{setup}pytest -n auto"


@pytest.mark.slow
def test_the_quick_start_reads_digits(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--data.image_size", "8", "--trainer.enable_progress_bar", "false"]  # a quarter of the pixels
    main(["fit", "-c", "configs/classification/digits.yaml", *quick])
    printed = capsys.readouterr().out
    accuracy = re.search(r"test/acc +([\d.]+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.97
    for name in ("best checkpoint:", "pictures:", "predictions:"):
        path = re.search(rf"{name} +(\S+)", printed)
        assert path is not None
        assert (workplace / path[1]).exists()


@pytest.mark.slow
def test_every_command_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {command[0] for command in COMMANDS} >= {"fit", "test", "predict", "models", "check", "export"}
    for command in COMMANDS:
        quick = ["--trainer.enable_progress_bar", "false"] if command[0] in ("fit", "test", "predict") else []
        if command[0] == "fit":
            quick += ["-c", "configs/trainer/smoke.yaml"]
        if "pets" in command:
            quick += ["--data.image_size", "32"]
        main([*command, *quick])
    assert (workplace / "network.onnx").is_file()
    assert (workplace / "digits_pipeline" / "model_index.json").is_file()
    assert list((workplace / "runs" / "wandb").glob("offline-run-*"))
    for results in ("predictions*.csv", "detections*.images.json"):
        assert "photos/grey.png" in "".join(path.read_text() for path in workplace.rglob(results))


def test_fine_tuning_in_python_leaves_the_body_alone(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "freeze=" in block]
    names: dict[str, Any] = {}
    exec(example.replace("image_size=224", "image_size=32"), names)
    assert "34 tensors were trained, 32 of them attention" in capsys.readouterr().out
    weights, task = torch.load("resnet18.pth"), names["task"]
    tuned = {name.removeprefix("backbone."): value for name, value in task.state_dict().items()}
    changed = {name for name, value in weights.items() if not name.startswith("fc.") and not value.equal(tuned[name])}
    assert not changed
    assert [group["name"] for group in task.optimizers().param_groups] == ["main", "attention"]


def test_the_configs_that_the_readme_names_are_there() -> None:
    for names in re.findall(r"^\| (`.*?`) \|", README, re.MULTILINE):
        for name in re.findall(
            r"`((?:classification|detection|diffusion|scores|reproduce|sweeps|logger|trainer)/[\w*.]+)`", names
        ):
            assert list((ROOT / "configs").glob(name)), name


def test_the_specification_of_a_comparison_can_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [specification] = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    Path("spec.yaml").write_text(specification)
    main(["reproduce", "spec.yaml", "--dry_run"])
    assert capsys.readouterr().out.count("dia-lightning fit") == 9
