"""The shipped specifications of comparisons, and the sweeps: the program accepts every command."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from dia_lightning.__main__ import main
from dia_lightning.attention import attach
from dia_lightning.cli.command import rehearse
from dia_lightning.models import get_model
from dia_lightning.reproduce.experiment import read_experiment
from tests.cli.conftest import call

ROOT = Path(__file__).parents[1]
SPECS = sorted((ROOT / "configs" / "reproduce").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))

#: Parameters of the papers' networks in millions, as far as they are known.
PARAMETERS = {
    "aaai_reduction": {"plain": 1.73, "r=1": 2.59, "r=4": 1.95, "r=8": 1.84, "r=16": 1.78},
    "aaai_depth": {
        **{"SE 83 layers": 0.99, "SE 164 layers": 1.93, "SE 245 layers": 2.87, "SE 407 layers": 4.74},
        **{"DIA-LSTM 83 layers": 1.11, "DIA-LSTM 164 layers": 1.95, "DIA-LSTM 245 layers": 2.78},
        "DIA-LSTM 407 layers": 4.45,
    },
    "aaai_cells_and_activation": {"sigmoid, 1 cell": 1.95, "tanh, 1 cell": 1.95, "sigmoid, 3 cells": 3.33},
    "cifar100_sharing": {"plain": 1.73, "SE per block": 1.93, "DIA-LSTM": 1.95},
}


def read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: str(path.stem))
def test_every_arm_of_a_specification_can_run(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = str(path.relative_to(ROOT))
    assert f"#   dia-lightning reproduce {spec}\n" in path.read_text()
    call("reproduce", spec, "--dry_run", "--runs", str(tmp_path))
    experiment = read_experiment(spec)
    assert experiment.name == path.stem
    assert capsys.readouterr().out.count("dia-lightning fit") == len(experiment.arms) * 5
    assert len(set(experiment.arms.values())) == len(experiment.arms)


@pytest.mark.parametrize("name", PARAMETERS)
def test_arms_have_the_parameters_of_the_papers(name: str) -> None:
    spec = read(ROOT / "configs" / "reproduce" / f"{name}.yaml")
    base = read(ROOT / spec["base"][0])["model"]["init_args"]
    for arm, millions in PARAMETERS[name].items():
        changes = {key.removeprefix("model."): value for key, value in {**spec["options"], **spec["arms"][arm]}.items()}
        model = {**base, **changes}
        with torch.device("meta"):
            network = get_model(model["backbone"], **model.get("backbone_args", {}))
            if model["attention"] is not None:
                attach(network, model["attention"], share=model["share"], **model.get("attention_args", {}))
        count = sum(parameter.numel() for parameter in network.parameters())
        assert round(count / 1e6, 2) == pytest.approx(millions), arm


def combinations(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The first and the last value of every parameter, as an agent of Weights & Biases gets them."""
    choices = {name: item.get("values") or [item["min"], item["max"]] for name, item in sweep["parameters"].items()}
    return [{name: {"value": values[end]} for name, values in choices.items()} for end in (0, -1)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.stem))
def test_the_commands_of_a_sweep_can_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.argv", ["dia-lightning"])
    sweep = read(path)
    assert f"configs/sweeps/{path.name}" in path.read_text()
    assert set(sweep) == {"program", "method", "metric", "parameters", "command"}
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"] == {"name": "val/acc", "goal": "maximize"}
    assert sweep["command"][:2] == ["${env}", "${program}"]
    for chosen in combinations(sweep):
        replaced = {f"${{{name}}}": value for name, value in create_sweep_command_args({"args": chosen}).items()}
        command = [word for part in sweep["command"][2:] for word in replaced.get(part, [part])]
        assert not any("$" in word for word in command)
        rehearse(command)


def test_the_program_of_a_sweep_is_the_one_that_is_installed() -> None:
    scripts = (ROOT / "pyproject.toml").read_text()
    assert f'dia-lightning = "{main.__module__}:{main.__name__}"' in scripts
    assert {read(path)["program"] for path in SWEEPS} == {"dia-lightning"}
