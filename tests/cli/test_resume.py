"""A training that was stopped and goes on is one training: one folder, one list of metrics, one best checkpoint."""

import csv
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from dia_lightning.cli.runs.lock import RunLock
from dia_lightning.cli.runs.run_of_checkpoint import config_of, source_of
from tests.cli.conftest import Run, call

FIT = ["fit", "-c", "tiny.yaml"]
LAST = Path("runs/tiny/version_0/checkpoints/last.ckpt")


class Stop(Callback):
    """Stops in mid-epoch, and keeps what a program that is killed there would leave."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            shutil.copytree("runs", "killed")
            raise KeyboardInterrupt


def rows(folder: Path) -> list[tuple[str, str, set[str]]]:
    """Epoch, step and what was logged, of each row."""
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [(row["epoch"], row["step"], {name for name, value in row.items() if value}) for row in table]


def best_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint knows about the best one."""
    states = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    [best] = [state for state in states if state.get("monitor") == "val/acc"]
    return dict(best)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_perfect(checkpoint: Path) -> None:
    """Give the best checkpoint of a run a score that no later epoch beats."""
    holds = torch.load(checkpoint, weights_only=True)
    for state in holds["callbacks"].values():
        if state.get("monitor") == "val/acc":
            state["best_k_models"] = {path: torch.tensor(1.5) for path in state["best_k_models"]}
            state["best_model_score"] = state["kth_value"] = torch.tensor(1.5)
    torch.save(holds, checkpoint)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A folder with a training of four epochs in `straight`, and one that was stopped in the third in `runs`."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "stopping", sys.modules[__name__])
        shutil.copy(trained / "tiny.yaml", folder)
        fit = [*FIT, "--trainer.max_epochs", "4"]
        call(*fit)
        Path("runs").rename("straight")
        with pytest.raises(SystemExit):
            call(*fit, "--trainer.callbacks+=stopping.Stop")
    return folder


@pytest.mark.parametrize("left", ["stopped", "killed"])
def test_a_stopped_training_that_goes_on_leaves_what_a_straight_one_does(
    run: Run, workplace: Path, stopped: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped / ("runs" if left == "stopped" else "killed"), "runs")
    if left == "killed":
        with open("runs/tiny/version_0/metrics.csv", "a") as file:
            file.write("2,4,0.")  # half a row
    run(*FIT, "--trainer.max_epochs", "4", "--ckpt_path", "last")
    assert "continuing in the run folder runs/tiny/version_0\n" in capsys.readouterr().err
    here, straight = Path("runs/tiny/version_0"), stopped / "straight/tiny/version_0"
    assert rows(here) == rows(straight)
    assert [path.name for path in here.parent.iterdir()] == ["version_0"]
    assert sorted(path.name for path in here.glob("*.yaml")) == ["config-v1.yaml", "config.yaml"]
    with open(here / "metrics.csv", newline="") as file:
        scores = [float(row["val/acc"]) for row in csv.DictReader(file) if row["val/acc"]]
    assert best_of(LAST)["best_model_score"] == pytest.approx(max(scores))
    best = f"best-e{scores.index(max(scores)):03d}.ckpt"
    assert best_of(LAST)["best_model_path"] == str(LAST.with_name(best))
    assert files(LAST.parent) == {best, "last.ckpt"}


def test_the_best_checkpoint_of_before_stays_the_best(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_perfect(LAST)
    again = [*FIT, "--trainer.max_epochs", "2", "--ckpt_path", "last", "--test_after_fit", "true"]
    run(*again)
    best = "runs/tiny/version_0/checkpoints/best-e000.ckpt"
    assert f"testing {best}" in capsys.readouterr().err
    assert best_of(LAST)["best_model_path"] == best
    run("validate", "-c", "tiny.yaml", "--ckpt_path", "best")
    assert f"checkpoint {best}\n" in capsys.readouterr().err
    before = rows(run_folder)
    assert [step for _, step, names in before if "test/acc" in names] == ["4"]

    capsys.readouterr()
    run(*again)  # nothing is left to train
    assert "nothing was left to train" in capsys.readouterr().err
    assert rows(run_folder) == before


def test_a_validation_that_a_kill_makes_come_twice_changes_no_score(run: Run, workplace: Path) -> None:
    every_step = [
        *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.init_args.every_n_train_steps=1"),
        *("--trainer.callbacks.init_args.filename=last-step", "--trainer.callbacks.init_args.save_top_k=1"),
    ]
    run(*FIT, *every_step)
    straight = best_of(LAST)
    assert straight["current_score"] is not None
    LAST.unlink()  # killed when the best one was written, and the newest one was not
    run(*FIT, *every_step, "--ckpt_path", "last")
    assert best_of(LAST) == straight


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process inherits files")
def test_loader_processes_that_outlive_a_killed_training_do_not_lock_its_folder(run_folder: Path) -> None:
    lock = RunLock()
    assert lock.take(run_folder)
    said, saying = os.pipe()
    ended, ending = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(saying, b"!")
        os.close(ending)
        os.read(ended, 1)  # as a worker that has not noticed yet
        os._exit(0)
    os.read(said, 1)
    lock.release()
    assert RunLock().take(run_folder)
    os.close(ending)
    os.waitpid(child, 0)


@pytest.mark.parametrize("how", ["other name", "copied file", "older", "write-protected", "in use"])
def test_in_another_folder_the_best_and_the_metrics_are_taken_along(
    run: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    make_perfect(LAST)
    options: list[str] = []
    checkpoint, target = LAST, Path("runs/tiny/version_1")
    if how == "other name":
        options, target = ["--trainer.logger.init_args.name", "other"], Path("runs/other/version_0")
    elif how == "copied file":
        checkpoint = Path(shutil.copy(LAST, "mine.ckpt"))
    elif how == "older":
        checkpoint = Path(shutil.copy(LAST, LAST.with_name("older.ckpt")))
        later = torch.load(LAST, weights_only=True)
        torch.save({**later, "global_step": later["global_step"] + 1}, LAST)
    elif how == "in use":
        other = RunLock()  # of a training that goes on
        assert other.take(run_folder)
    else:
        access = os.access
        protected = Path("runs/tiny/version_0")  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, *mode, **more: path != protected and access(path, *mode, **more))
    before = contents(Path("runs"))
    run(*FIT, "--trainer.max_epochs", "2", "--ckpt_path", str(checkpoint), *options)

    assert {path: text for path, text in contents(Path("runs")).items() if path in before} == before
    said = capsys.readouterr().err
    assert "continuing in a new run folder, with a copy of the best checkpoint" in said
    reason = {"other name": "the options do not lead to", "copied file": "mine.ckpt is not in the folder of a run"}
    reason |= {"older": "has a later checkpoint, last.ckpt", "write-protected": "is write-protected"}
    assert reason.get(how, "another training is writing to runs/tiny/version_0") in said
    assert best_of(target / "checkpoints/last.ckpt")["best_model_path"] == f"{target}/checkpoints/best-e000.ckpt"
    assert (target / "checkpoints/best-e000.ckpt").is_file()
    steps = [step for _, step, names in rows(target) if "train/loss" in names]
    assert steps == (["2", "3"] if how == "copied file" else ["0", "1", "2", "3"])


def test_an_older_checkpoint_is_not_mixed_into_a_folder_that_the_options_ask_for(
    fails: Callable[..., str], run_folder: Path
) -> None:
    older = shutil.copy(LAST, LAST.with_name("older.ckpt"))
    later = torch.load(LAST, weights_only=True)
    torch.save({**later, "global_step": later["global_step"] + 1}, LAST)
    message = fails(*FIT, "--ckpt_path", str(older), "--trainer.logger.init_args.version", "0")
    assert message.startswith("The options of CSVLogger ask for runs/tiny/version_0, but ")
    assert "runs/tiny/version_0 has a later checkpoint, last.ckpt: both trainings would mix" in message


def test_a_job_that_slurm_queues_again_keeps_its_best_checkpoint(
    run: Run, run_folder: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_perfect(LAST)
    shutil.copy(LAST, "hpc_ckpt_2.ckpt")
    Path("hpc_ckpt_10.ckpt").write_bytes(Path("hpc_ckpt_2.ckpt").read_bytes())
    Path("hpc_ckpt_2.ckpt").write_text("older")
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "NTASKS_PER_NODE": "1", "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    run(*FIT, "--trainer.max_epochs", "2")
    best = best_of(Path("runs/tiny/version_1/checkpoints/last.ckpt"))
    assert best["best_model_path"] == "runs/tiny/version_1/checkpoints/best-e000.ckpt"
    assert fails("test", "-c", "tiny.yaml").startswith("Lightning would load hpc_ckpt_10.ckpt")


@pytest.mark.parametrize("place", ["runs/a/checkpoints/val", "scratch/checkpoints/a", "checkpoints"])
def test_the_run_of_a_checkpoint_is_found(workplace: Path, place: str) -> None:
    run = Path(place).parents[1] if place.startswith("runs") else Path("runs/a")
    for folder in (Path(place), run):
        folder.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    checkpoint = Path(place, "a.ckpt")
    checkpoint.touch()
    written = {"callbacks": {"best": {"dirpath": place}}, "dia_run": {"folder": str(run)}}
    assert source_of(str(checkpoint), written).folder == run


def test_commands_take_the_config_of_the_latest_start(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*FIT, "--ckpt_path", "last", "--trainer.max_epochs", "2", "--data.image_size", "16")
    assert config_of(LAST) == Path("runs/tiny/version_0/config-v1.yaml")
    run("validate", "--ckpt_path", str(LAST))
    assert "config runs/tiny/version_0/config-v1.yaml\n" in capsys.readouterr().err


@pytest.mark.parametrize(("step", "name"), [(2, "config.yaml"), (3, "config-v1.yaml"), (9, "config-v3.yaml")])
def test_a_config_counts_from_the_step_that_the_run_went_on_from(workplace: Path, step: int, name: str) -> None:
    checkpoint = Path("runs/a/checkpoints/last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    torch.save({"global_step": step}, checkpoint)
    starts = {"config": None, "config-v1": 2, "config-v2": 4, "config-v3": 4, "config-v4": None}
    for number, (config, start) in enumerate(starts.items()):
        line = "trainer: {}" if start is None else f"# The training went on with this config from step {start}"
        Path("runs/a", f"{config}.yaml").write_text(line)
        os.utime(Path("runs/a", f"{config}.yaml"), (number, number))
    assert config_of(checkpoint) == Path("runs/a", name)


@pytest.mark.parametrize("text", ["epoch;step\n0;1\n", "epoch,step,a\n0,,1\n", "epoch,a\n0,1\n"])
def test_a_table_of_metrics_that_is_none_is_refused_before_training(
    fails: Callable[..., str], run_folder: Path, text: str
) -> None:
    metrics = run_folder / "metrics.csv"
    metrics.write_text(text)
    before = contents(run_folder)
    message = fails(*FIT, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert "runs/tiny/version_0/metrics.csv is not as a CSVLogger wrote it" in message
    assert contents(run_folder) == before


def test_a_table_of_metrics_goes_on_after_a_power_cut_and_a_spreadsheet(run: Run, run_folder: Path) -> None:
    metrics = run_folder / "metrics.csv"
    before = rows(run_folder)
    metrics.write_bytes(b"\xef\xbb\xbf" + metrics.read_bytes().replace(b"\n", b"\r\n") + bytes(100))
    run(*FIT, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert rows(run_folder)[: len(before)] == before
    assert [step for _, step, names in rows(run_folder) if "train/loss" in names] == ["0", "1", "2", "3"]


def test_tensorboard_beside_the_csv_file_goes_on_too_and_hides_what_comes_again(run: Run, workplace: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    board = '{"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "board"}}'
    run(*FIT, f"--trainer.logger+={board}")
    made = torch.load(LAST, weights_only=True)
    assert made["dia_run"]["versions"] == {"runs/tiny": 0, "runs/board": 0}
    run(*FIT, f"--trainer.logger+={board}", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert [path.name for path in Path("runs/board").iterdir()] == ["version_0"]
    events = EventAccumulator("runs/board/version_0")
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


def test_a_checkpoint_cannot_lead_out_of_the_folder_of_the_run(run: Run, run_folder: Path) -> None:
    Path("private.txt").write_text("secret")
    holds = torch.load(LAST, weights_only=True)
    holds["dia_run"] = {"folder": "runs/tiny/version_0", "versions": {"runs/tiny": 0, "runs/b": "../../away"}}
    for state in holds["callbacks"].values():
        state |= {"best_k_models": {str(Path("private.txt").absolute()): torch.tensor(0.0)}}
    torch.save(holds, LAST)
    board = '{"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "b"}}'
    run(*FIT, "--ckpt_path", "last", "--trainer.max_epochs", "2", f"--trainer.logger+={board}")
    assert not Path("away").exists()
    assert not list(Path("runs").rglob("private*"))
