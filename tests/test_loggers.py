"""Weights & Biases without an account: the contents of a run's files, and what happens when something is wrong."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from dia_lightning.loggers import WandbLogger
from dia_lightning.loggers._histograms import histograms
from tests.cli.conftest import CONFIG

ROOT = Path(__file__).parents[1]


def run_python(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder where nobody is logged in."""
    nobody = {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_CACHE_DIR": str(folder)}
    nobody |= {"WANDB_CONFIG_DIR": str(folder), "WANDB_DATA_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, *args],
        env={**inherited, "PYTHONPATH": str(ROOT), **nobody, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=200,
    )


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/wandb/offline-run-*"))


@cache
def inspect(run: Path, *options: str) -> str:
    """Read a run with wandb's own reader."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", *options, "--json", str(run)]
    return subprocess.check_output(command, text=True, env={**os.environ, "WANDB_MODE": "offline"})


def summary(run: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(inspect(run, "--summary"))
    return whole


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in inspect(run).splitlines() if line]
    return [line[kind] for line in lines if line["type"] == kind]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two epochs were logged with every option, and a third by `--ckpt_path last`."""
    folder = tmp_path_factory.mktemp("logged")
    (folder / "tiny.yaml").write_text(CONFIG)
    fit = ["fit", "-c", "tiny.yaml", "-c", str(ROOT / "configs" / "logger" / "wandb.yaml")]
    fit += ["--trainer.logger.init_args.offline", "true"]
    every = ["--trainer.max_epochs", "2", "--trainer.callbacks+=PredictionTable", "--test_after_fit", "true"]
    every += ["--trainer.logger.init_args.log_model", "true", "--trainer.logger.init_args.watch", "all"]
    first = [*fit, *every, "--trainer.logger.init_args.id", "run-7"]
    second = [*fit, "--ckpt_path", "last", "--trainer.max_epochs", "3"]
    code = "import sys, wandb\nfrom dia_lightning.__main__ import main\nsys.argv = ['dia-lightning']\n"
    result = run_python(folder, "-c", f"{code}main({first})\nwandb.finish()\nmain({second})")
    assert result.returncode == 0, result.stderr
    (folder / "stderr.txt").write_text(result.stderr)
    return folder


def history(run: Path) -> list[dict[str, Any]]:
    return [item["item"] for item in records(run, "history")]


def test_a_run_has_the_id_that_the_command_gave(logged: Path) -> None:
    assert summary(offline_runs(logged)[0])["run_id"] == "run-7"


def test_the_table_of_runs_shows_the_best_value_beside_the_last(logged: Path) -> None:
    run = offline_runs(logged)[0]
    values = [item["val/acc"] for item in history(run) if "val/acc" in item]
    assert len(values) == 2
    assert summary(run)["summary"]["val/acc"] == {"max": max(values), "last": values[-1]}


def test_the_best_and_the_last_checkpoint_become_artifacts_once(logged: Path) -> None:
    found = [item for item in records(offline_runs(logged)[0], "artifact") if item["type"] == "model"]
    aliases = [set(item["aliases"]) - {"latest"} for item in found]
    assert aliases == [{"best"}, {"last"}]
    assert {item["name"] for item in found} == {"model-run-7"}
    best = json.loads(found[0]["metadata"])
    assert (best["filename"][:5], best["monitor"]) == ("best-", "val/acc")
    assert not [item for item in records(offline_runs(logged)[1], "artifact") if item["type"] == "model"]


def test_histograms_of_gradients_and_parameters_are_logged_on_request(logged: Path) -> None:
    first, second = (set().union(*history(run)) for run in offline_runs(logged))
    for kind in ("gradients", "parameters"):
        assert any(key.startswith(f"{kind}/backbone.conv1.weight") for key in first)
        assert not any(key.startswith(kind) for key in second)


def test_a_table_of_predictions_has_the_most_confident_mistakes_first(logged: Path) -> None:
    (file,) = (offline_runs(logged)[0] / "files" / "media" / "table" / "test").glob("prediction_table*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["sample", "image", "true", "predicted", "confidence", "correct"]
    with next(logged.glob("runs/tiny/version_0/metrics.csv")).open() as metrics:
        assert "test/acc" in metrics.readline()
    wrong = [row for row in table["data"] if not row[5]]
    assert wrong
    assert table["data"][: len(wrong)] == wrong
    assert [row[4] for row in wrong] == sorted((row[4] for row in wrong), reverse=True)
    assert all((row[2] == row[3]) == row[5] for row in table["data"])
    (kept,) = (item for item in records(offline_runs(logged)[0], "artifact") if item["type"] == "run_table")
    pictures = [item for item in kept["manifest"]["contents"] if item["path"].endswith(".png")]
    assert len(pictures) == len(table["data"])


def test_training_goes_on_in_the_run_of_the_checkpoint_and_steps_do_not_go_backwards(logged: Path) -> None:
    first, second = offline_runs(logged)
    assert summary(second)["run_id"] == "run-7"
    assert (logged / "stderr.txt").read_text().count("resuming the Weights & Biases run run-7") == 1
    steps = [[item["trainer/global_step"] for item in history(run) if "train/loss" in item] for run in (first, second)]
    assert min(steps[1]) > max(steps[0])
    assert [path.name for path in (logged / "runs" / "tiny").iterdir()] == ["version_0"]
    assert (logged / "runs" / "tiny" / "version_0" / "wandb-id.txt").read_text() == "run-7\n"


FAULTY = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from dia_lightning.loggers import WandbLogger
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer

class Kill(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):  # ended by now
                    name, _, rest = stat.read_text().rpartition(") ")
                    if "wandb-core" in name and int(rest.split()[1]) == os.getpid():
                        os.kill(int(name.split()[0]), signal.SIGSTOP if "hang" in sys.argv else signal.SIGKILL)
                        print("killed")

folder = Path(sys.argv[1])
settings = {"init_timeout": 2}  # seconds, which pass where the server cannot be reached
loggers = [CSVLogger(folder, name="csv")]
loggers += [WandbLogger(save_dir=folder / "runs", watch="all", log_model=True, settings=settings)]
if "hang" in sys.argv:
    loggers[1] = WandbLogger(save_dir=folder / "runs", offline=True, settings={"finish_timeout": 1})
callbacks = [Kill()] if len(sys.argv) > 2 else []
trainer = tiny_trainer(folder, *callbacks, logger=loggers, max_epochs=3, enable_checkpointing=True)
trainer.fit(TinyTask(), datamodule=TinyData())
loggers[1].experiment.config.update({"a": 1})
print("trained", trainer.global_step, loggers[1].version)
"""


def trained_with_csv(result: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert result.returncode == 0, result.stderr
    assert "trained 18" in result.stdout
    with open(folder / "csv" / "version_0" / "metrics.csv", newline="") as file:
        assert max(int(row["step"]) for row in csv.DictReader(file)) == 17  # W&B is gone from step 6 on
    assert "Traceback" not in result.stderr


def test_without_a_key_a_run_is_offline_and_without_wandb_core_it_goes_on(tmp_path: Path) -> None:
    result = run_python(tmp_path, "-c", FAULTY, str(tmp_path), "kill")
    trained_with_csv(result, tmp_path)
    (run,) = offline_runs(tmp_path)
    assert result.stderr.count("did not start online (No API key configured") == 1
    assert f"wandb sync {run}" in result.stderr
    assert result.stdout.count("killed") == 1
    assert result.stderr.count("Weights & Biases was lost (ConnectionResetError") == 1
    assert f" {run.name.rpartition('-')[2]}" in result.stdout  # the id stays, for folders are named after it


@pytest.mark.slow
def test_a_program_ends_although_wandb_core_hangs(tmp_path: Path) -> None:
    result = run_python(tmp_path, "-c", FAULTY, str(tmp_path), "hang")
    trained_with_csv(result, tmp_path)
    (run,) = offline_runs(tmp_path)
    assert result.stderr.count(f"did not end within 11 seconds and was stopped. What it has written is in {run}") == 1


@pytest.mark.slow
def test_with_an_unreachable_server_a_run_is_offline(tmp_path: Path) -> None:
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    result = run_python(tmp_path, "-c", FAULTY, str(tmp_path), **server)
    trained_with_csv(result, tmp_path)
    (run,) = offline_runs(tmp_path)
    assert result.stderr.count("Weights & Biases did not start online") == 1
    assert f"wandb sync {run}" in result.stderr
    assert summary(run)["summary"]["trainer/global_step"] == 17


class FakeRun(SimpleNamespace):
    """Keeps what it is given."""

    def __init__(self, sweep_id: str | None = None) -> None:
        super().__init__(id="run-1", sweep_id=sweep_id, defined={}, logged=[], settings=SimpleNamespace(sync_dir=""))

    def define_metric(self, name: str, **options: Any) -> None:
        self.defined[name] = options

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each start of a fake run."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> FakeRun:
        calls.append(arguments)
        return FakeRun("sweep-1" if "sweep" in arguments["project"] else None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return calls


def test_wandb_gets_what_was_given_without_none(started: list[dict[str, Any]]) -> None:
    _ = WandbLogger(id="abc", tags=["x"], config={"token": "secret"}).experiment
    (arguments,) = started
    assert arguments.pop("settings").init_timeout == 10
    given = {"id": "abc", "tags": ["x"], "config": {"token": "***"}}
    assert arguments == {"project": "dia-lightning", "dir": os.getcwd(), "resume": "allow", **given}


def test_user_settings_take_precedence_over_ours(started: list[dict[str, Any]]) -> None:
    _ = WandbLogger(settings={"init_timeout": 60}).experiment
    assert started[0]["settings"].init_timeout == 60


def test_offline_takes_checkpoints_and_leaves_the_process_alone(started: list[dict[str, Any]]) -> None:
    _ = WandbLogger(offline=True, log_model=True).experiment
    assert started[0]["mode"] == "offline"
    assert "WANDB_MODE" not in os.environ


def test_other_ranks_start_no_run(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = WandbLogger(watch="all", log_model=True)
    logger.log_graph(nn.Linear(2, 1))
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert not isinstance(logger.experiment, FakeRun)
    assert started == []


@pytest.mark.parametrize(("project", "expected"), [("mine", {"summary": "max,last"}), ("my-sweep", None)])
def test_in_a_sweep_the_monitored_metric_stays_one_number(
    started: list[dict[str, Any]], project: str, expected: dict[str, str] | None
) -> None:
    module = LightningModule()
    module.trainer = Trainer(callbacks=[ModelCheckpoint(monitor="val/acc", mode="max")], logger=False)
    logger = WandbLogger(project=project)
    logger.log_graph(module)
    run: Any = logger.experiment
    axis = {"step_metric": "trainer/global_step", "step_sync": True}
    assert run.defined.get("val/acc") == (None if expected is None else {**axis, **expected})


def test_histograms_come_at_an_interval_of_training_steps_and_after_a_backward_pass(
    started: list[dict[str, Any]],
) -> None:
    network = nn.Linear(2, 1)
    logger = WandbLogger(watch="gradients", watch_freq=10)
    logger.log_graph(network)
    logger.log_metrics({"a": 0.0}, step=0)  # no gradient yet
    network(torch.ones(1, 2)).sum().backward()
    for step in (1, 5, 11, 12):
        logger.log_metrics({"a": 0.0}, step=step)
    network.eval()
    logger.log_metrics({"a": 0.0}, step=50)
    run: Any = logger.experiment
    assert [values["trainer/global_step"] for values in run.logged if "gradients/weight" in values] == [1, 11]


@pytest.mark.parametrize("what", ["gradients", "parameters"])
def test_a_histogram_counts_every_finite_value(what: Any) -> None:
    network = nn.Linear(50, 3)
    network(torch.randn(8, 50)).square().sum().backward()
    tensor = network.weight.grad if what == "gradients" else network.weight
    assert tensor is not None
    tensor.data[0, 0] = torch.nan
    found = histograms(network, what)
    assert set(found) == {f"{what}/weight", f"{what}/bias"}
    counts, edges = np.histogram(tensor.detach().double().numpy().ravel()[1:], bins=64)
    assert found[f"{what}/weight"].histogram == counts.tolist()
    assert found[f"{what}/weight"].bins == pytest.approx(edges.tolist())


def test_weights_that_are_nearly_equal_have_a_histogram() -> None:
    network = nn.LayerNorm(64)
    network(torch.randn(2, 64)).square().sum().backward()
    network.weight.data += 4e-7 * torch.randn(64).sign()
    assert sum(histograms(network, "parameters")["parameters/weight"].histogram) == 64


def test_the_best_value_has_the_prefix_of_the_metric(started: list[dict[str, Any]]) -> None:
    module = LightningModule()
    module.trainer = Trainer(callbacks=[ModelCheckpoint(monitor="val/acc", mode="max")], logger=False)
    logger = WandbLogger(prefix="p")
    logger.log_graph(module)
    run: Any = logger.experiment
    assert run.defined["p-val/acc"]["summary"] == "max,last"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watch": "grads"}, "watch must be 'gradients', 'parameters', 'all' or None, got 'grads'"),
        ({"watch_freq": 0}, "watch_freq must be 1 step or more, got 0"),
        ({"id": "my/run"}, "id 'my/run' is no id of a run. Use letters, digits"),
        ({"settings": {"api_kee": "very-secret"}}, r"are wrong \(api_kee: "),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        WandbLogger(**options)
    assert "very-secret" not in str(error.value)


TWO_FOLDERS = """
import os
from dia_lightning.loggers import WandbLogger

for folder in ("first", "second"):
    os.makedirs(folder)
    os.chdir(folder)
    logger = WandbLogger(save_dir="runs", offline=True)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.experiment.finish()
    os.chdir("..")
"""


def test_runs_of_one_process_are_in_the_folders_in_which_they_began(tmp_path: Path) -> None:
    result = run_python(tmp_path, "-c", TWO_FOLDERS)
    assert result.returncode == 0, result.stderr
    for folder in ("first", "second"):
        (run,) = offline_runs(tmp_path / folder)
        assert summary(run)["summary"]["loss"] == 1.0


def test_importing_the_loggers_does_not_import_wandb() -> None:
    code: Sequence[str] = ("-c", "import sys, dia_lightning.loggers; print('wandb' in sys.modules)")
    assert subprocess.check_output([sys.executable, *code], text=True).strip() == "False"
