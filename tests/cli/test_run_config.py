"""The config that is kept with every run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import _loaders_dumpers

from dia_lightning._redact import redact
from dia_lightning.cli.parsing import config_reader
from dia_lightning.cli.runs._saved_config import SaveRunConfig
from tests.cli.conftest import Run

WANDB = """\
trainer:
  logger:
    class_path: dia_lightning.loggers.WandbLogger
    init_args: {project: tiny, save_dir: runs, config: {service: {api_key: very-secret, size: 3}}}
"""


def read(path: Path | str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    return config


def test_a_saved_config_runs_the_other_commands(run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("test", "-c", str(run_folder / "config.yaml"), "--ckpt_path", "best")
    assert "test/acc" in capsys.readouterr().out
    again = read(run_folder.with_name("version_1") / "config.yaml")
    assert again["model"] == read(run_folder / "config.yaml")["model"]


def test_a_saved_config_repeats_the_run(run: Run, run_folder: Path) -> None:
    run("fit", "-c", str(run_folder / "config.yaml"))
    assert read(run_folder.with_name("version_1") / "config.yaml") == read(run_folder / "config.yaml")


def test_one_batch_is_not_all_batches(run: Run, workplace: Path) -> None:
    run("fit", "-c", "tiny.yaml", "--trainer.limit_val_batches", "1", "--trainer.limit_train_batches", "1.0")
    trainer = read("runs/tiny/version_0/config.yaml")["trainer"]
    assert repr(trainer["limit_val_batches"]) == "1"
    assert repr(trainer["limit_train_batches"]) == "1.0"


def test_a_second_run_without_a_logger_keeps_the_first_config(run: Run, workplace: Path) -> None:
    monitor = "--trainer.callbacks+=LearningRateMonitor"  # as in the shipped configs; left out without a logger
    for seed in ("1", "2"):
        run("fit", "-c", "tiny.yaml", "--trainer.logger", "false", "--seed_everything", seed, monitor)
    assert read("config.yaml")["seed_everything"] == 1
    assert read("config-v1.yaml")["seed_everything"] == 2


def test_a_process_that_was_started_with_a_copy_of_the_parser_writes_the_config(
    run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = SaveRunConfig.setup

    def setup_elsewhere(self: SaveRunConfig, *args: Any, **options: Any) -> None:
        for table in (_loaders_dumpers.loaders, _loaders_dumpers.loader_exceptions):
            table.pop(config_reader.MODE)  # what jsonargparse keeps per process
        setup(self, *args, **options)

    monkeypatch.setattr(SaveRunConfig, "setup", setup_elsewhere)
    run("fit", "-c", "tiny.yaml")
    assert read("runs/tiny/version_0/config.yaml")["model"]["init_args"]["lr"] == 0.05


def test_nothing_is_written_by_a_fast_dev_run(run: Run, workplace: Path) -> None:
    callbacks = [f"--trainer.callbacks+={name}" for name in ("PredictionGrid", "PredictionWriter", "RunSummary")]
    run("fit", "-c", "tiny.yaml", *callbacks, "--trainer.fast_dev_run", "true", "--test_after_fit", "true")
    assert sorted(path.name for path in workplace.rglob("*") if path.is_file()) == ["bare.yaml", "tiny.yaml"]


def test_a_fast_dev_run_of_a_checkpoint_copies_nothing(
    run: Run, run_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(workplace.rglob("*"))
    run("fit", "-c", "tiny.yaml", "--trainer.fast_dev_run", "true", "--ckpt_path", "last")
    assert sorted(workplace.rglob("*")) == before
    assert (
        "how training goes on from runs/tiny/version_0/checkpoints/last.ckpt was not tried" in capsys.readouterr().err
    )


@pytest.mark.parametrize("key", ["api_key", "WANDB_API_KEY", "token", "hf_token", "client_secret", "Password"])
def test_secrets_are_redacted_at_any_depth(key: str) -> None:
    config = {"a": [{key: "abc", "lr": 0.1}], key: {"b": ["abc"]}, "data": {key: None}}
    assert redact(config) == {"a": [{key: "***", "lr": 0.1}], key: {"b": ["***"]}, "data": {key: None}}


def test_wandb_alone_gets_the_nested_config_without_secrets_twice(
    run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Path("wandb.yaml").write_text(WANDB)
    for _ in range(2):
        run("fit", "-c", "tiny.yaml", "-c", "wandb.yaml")
        wandb.finish()
    configs = sorted(Path("runs/tiny").glob("*/config.yaml"))
    assert len(configs) == 2
    assert all((path.parent / "checkpoints" / "last.ckpt").is_file() for path in configs)
    assert "very-secret" not in configs[0].read_text()

    [first, _] = sorted(Path("runs/wandb").glob("offline-run-*"))
    inspect = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(first)]
    seen = json.loads(subprocess.check_output(inspect, env={**os.environ, "WANDB_MODE": "offline"}))
    assert set(seen["config"]) == {"cli", "service"}  # nested, without a flat twin
    cli = seen["config"]["cli"]
    assert cli["model"]["init_args"]["backbone_args"]["depth"] == 11
    assert cli["data"]["class_path"] == "dia_lightning.datamodules.DigitsDataModule"
    assert cli["trainer"]["max_epochs"] == 1
    written = b"".join(path.read_bytes() for path in Path("runs").rglob("*") if path.is_file())
    assert b"very-secret" not in written
