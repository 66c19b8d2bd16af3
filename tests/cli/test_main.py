"""The program as a whole: start-up, endings, what is printed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dia_lightning.tasks import ClassificationTask
from tests.cli.conftest import Run

HEAVY = ("torch", "torchvision", "lightning", "wandb", "timm", "diffusers", "matplotlib", "sklearn")


def python(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env={**os.environ, **(env or {})})


def test_importing_the_package_and_asking_for_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, dia_lightning; from dia_lightning.__main__ import main; main(['--help']); main(['--version']); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = python("-c", code)
    assert result.stdout.startswith("usage: dia-lightning COMMAND")
    assert result.stdout.splitlines()[-2:] == [f"dia-lightning {__import__('dia_lightning').__version__}", "[]"]


def test_a_torchvision_that_does_not_fit_torch_is_one_line(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    result = python("-m", "dia_lightning", "models", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("dia-lightning: error: torch ")
    assert "do not fit: install both together: python -m pip install --upgrade torch torchvision" in line


def test_the_list_of_networks_does_without_lightning() -> None:
    code = (
        "import sys; from dia_lightning.__main__ import main; main(['models', 'cifar_*']); "
        "print([name for name in ('lightning', 'wandb', 'timm') if name in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_no_command_shows_the_usage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("usage: dia-lightning COMMAND")


@pytest.mark.parametrize("args", [["models", "cifar_*"], ["--help"], ["models", "--help"]])
def test_a_reader_that_ends_early_ends_the_program_quietly(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does when it has enough
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as exit_info:
            run(*args)
    assert exit_info.value.code == 141
    assert capsys.readouterr().err == ""


def test_help_says_what_options_do_here_without_markup(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["predict", "--help"], ["fit", "--model.help", "ClassificationTask"]):
        with pytest.raises(SystemExit):
            run(*args)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Checkpoint to use: a file, or 'last' or 'best' of the newest run. Without -c" in shown
    assert "as attach takes them" in shown
    for markup in (":func:", ":class:", ":param", "``", "registry``", "Path/URL"):
        assert markup not in shown


def test_options_of_a_list_say_whose_they_are(run: Run, capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    added = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    later = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.logger=false", "--trainer.fast_dev_run=true"]
    run("fit", "-c", "tiny.yaml", *added, "--trainer.callbacks.patience=7", *later)
    said = capsys.readouterr().err
    assert "--trainer.callbacks.monitor went to EarlyStopping, the last in the list." in said
    assert "--trainer.callbacks.patience went to EarlyStopping" in said


def test_lightning_does_not_advertise(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run("fit", "-c", "tiny.yaml")
    printed = capfd.readouterr()
    assert "Tip:" not in printed.out + printed.err


def test_fit_ends_with_one_test_of_the_best_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "-c", "tiny.yaml", "--trainer.max_epochs", "2", "--test_after_fit", "true")
    printed = capsys.readouterr()
    assert printed.out.count("Test metric") == 1
    assert "dia-lightning: testing runs/tiny/version_0/checkpoints/best-e00" in printed.err
    [metrics] = Path("runs").rglob("metrics.csv")
    assert "test/acc" in metrics.read_text()


def test_fit_does_not_test_unless_asked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "-c", "tiny.yaml")
    assert "Test metric" not in capsys.readouterr().out


def test_without_a_best_checkpoint_the_last_weights_are_tested(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "-c", "tiny.yaml", "--test_after_fit", "true", "--trainer.fast_dev_run", "true")
    printed = capsys.readouterr()
    assert printed.out.count("Test metric") == 1
    assert "testing the last weights" in printed.err


def test_predict_runs_from_the_best_checkpoint(run: Run, run_folder: Path) -> None:
    run("predict", "-c", "tiny.yaml", "--ckpt_path", "best", "--trainer.callbacks+=PredictionWriter")
    [csv] = Path("runs").rglob("predictions.csv")
    assert len(csv.read_text().splitlines()) == 1 + 20


def test_training_is_reproducible_by_default(run: Run, workplace: Path) -> None:
    for _ in range(2):
        run("fit", "-c", "tiny.yaml")
    first, second = (
        torch.load(f"runs/tiny/version_{version}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for version in (0, 1)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


class TestErrors:
    def raising(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        def training_step(*_: object) -> None:
            raise error

        monkeypatch.setattr(ClassificationTask, "training_step", training_step)

    def test_unexpected_ones_keep_their_trace(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raising(monkeypatch, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            run("fit", "-c", "tiny.yaml")

    def test_value_errors_of_other_packages_keep_their_trace(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raising(monkeypatch, ValueError("shapes"))
        with pytest.raises(ValueError, match="shapes"):
            run("fit", "-c", "tiny.yaml")

    def test_missing_data_is_one_line(self, fails: Callable[..., str]) -> None:
        options = ["--data", "CIFAR100DataModule", "--data.root", "nowhere", "--data.download", "false"]
        config = Path("tiny.yaml").read_text().partition("data:")[0]
        Path("no_data.yaml").write_text(config)
        assert "nowhere" in fails("fit", "-c", "no_data.yaml", *options)

    def test_a_loss_that_is_not_finite_is_one_line_and_a_code_of_its_own(
        self, run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_info:
            run("fit", "-c", "tiny.yaml", "--model.lr", "1e30", "--trainer.max_epochs", "5")
        assert exit_info.value.code == 3
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert line.startswith("dia-lightning: error: The loss is")

    def test_the_trace_is_there_for_the_asking(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DIA_TRACEBACK", "1")
        with pytest.raises(Exception, match="lr must be a positive number") as info:
            run("fit", "-c", "tiny.yaml", "--model.lr", "-1")
        assert isinstance(info.value.__cause__, ValueError)

    @pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (SIGTERMException, 143)])
    def test_a_stop_says_how_to_go_on_and_is_no_success(
        self,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        stop: type[BaseException],
        code: int,
    ) -> None:
        step = ClassificationTask.training_step

        def interrupted(task: ClassificationTask, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            if task.current_epoch == 1:
                raise stop
            return step(task, batch, index)

        monkeypatch.setattr(ClassificationTask, "training_step", interrupted)
        with pytest.raises(SystemExit) as exit_info:
            run("fit", "-c", "tiny.yaml", "--trainer.max_epochs", "3")
        assert exit_info.value.code == code
        path = "runs/tiny/version_0/checkpoints/last.ckpt"
        assert f"repeat the command with --ckpt_path {path} to go on" in capsys.readouterr().err
        monkeypatch.undo()

    def test_ctrl_c_before_the_first_epoch_says_that_nothing_is_kept(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.raising(monkeypatch, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            run("fit", "-c", "tiny.yaml")
        assert "stopped before the first checkpoint" in capsys.readouterr().err
