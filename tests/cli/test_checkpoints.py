"""What `--ckpt_path` finds, what it takes over, and what it refuses."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dia_lightning.cli.runs.checkpoint_misfit import check_fits, misfit
from dia_lightning.cli.runs.find_checkpoint import find_checkpoint
from dia_lightning.cli.runs.run_of_checkpoint import run_folder_of
from tests.cli.conftest import Run

Fails = Callable[..., str]


def newest_config(root: Path = Path("runs/tiny")) -> dict[str, Any]:
    newest = max(root.glob("version_*"), key=lambda folder: int(folder.name.rpartition("_")[2]))
    config: dict[str, Any] = yaml.safe_load((newest / "config.yaml").read_text())
    return config


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def test_command_line_beats_config_beats_checkpoint_beats_default(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (
        Path("bare.yaml")
        .read_text()
        .replace(
            "class_path: ClassificationTask",
            "class_path: ClassificationTask\n  init_args: {weight_decay: 2e-3, lr: 0.6}",
        )
    )
    Path("other.yaml").write_text(config)
    checkpoint = str(run_folder / "checkpoints" / "last.ckpt")
    run(
        "validate",
        "-c",
        "other.yaml",
        "--ckpt_path",
        checkpoint,
        "--model.lr",
        "0.7",
        "--model.backbone",
        "cifar_resnet",
    )
    used = newest_config()["model"]["init_args"]
    assert used["lr"] == 0.7  # command line, against all others
    assert used["weight_decay"] == 2e-3  # config, against the checkpoint's 1e-3
    assert used["momentum"] == 0.8  # checkpoint, against the default of 0.9
    assert used["backbone_args"] == {"depth": 11}  # checkpoint; without it the weights would not fit
    assert used["gamma"] == 0.1  # default
    said = capsys.readouterr().err
    assert "from the checkpoint: attention='dia-lstm', backbone_args={'depth': 11}, momentum=0.8\n" in said
    assert "given and kept: lr=0.7, weight_decay=0.002; the checkpoint has lr=0.05, weight_decay=0.001" in said


def test_values_equal_to_the_default_count_as_given(run: Run, run_folder: Path) -> None:
    checkpoint = str(run_folder / "checkpoints" / "last.ckpt")
    run(
        "validate",
        "-c",
        "bare.yaml",
        "--model.backbone",
        "cifar_resnet",
        "--model.momentum",
        "0.9",
        "--ckpt_path",
        checkpoint,
    )
    assert newest_config()["model"]["init_args"]["momentum"] == 0.9


def test_class_paths_in_a_checkpoint_are_never_imported(
    run: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("evil_module.py").write_text("class Thing: pass\n\ndef run(*args): pass\n")
    monkeypatch.syspath_prepend(os.getcwd())
    path = run_folder / "checkpoints" / "last.ckpt"
    checkpoint = load(path)
    checkpoint["hyper_parameters"] |= {
        "_class_path": "evil_module.ClassificationTask",
        "_instantiator": "evil_module.run",
        "optimizer": "evil_module.run",
        "schedule": {"class_path": "evil_module.Thing", "init_args": {}},
        "attention_args": {"nested": {"class_path": "evil_module.Thing"}},
    }
    torch.save(checkpoint, path)
    run("validate", "-c", "bare.yaml", "--model.backbone", "cifar_resnet", "--ckpt_path", str(path))
    assert "evil_module" not in sys.modules
    used = newest_config()["model"]["init_args"]
    assert (used["optimizer"], used["schedule"], used["attention_args"]) == ("sgd", "constant", None)
    assert used["backbone_args"] == {"depth": 11}  # what is plain is still taken


def test_last_resumes_the_newest_run_where_it_stopped(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load(run_folder / "checkpoints" / "last.ckpt")
    run("fit", "-c", "tiny.yaml", "--trainer.max_epochs", "2", "--ckpt_path", "last")
    after = load(run_folder / "checkpoints" / "last.ckpt")
    assert (before["epoch"], after["epoch"]) == (0, 1)
    assert after["global_step"] == 2 * before["global_step"] == 4
    assert str(Path("runs/tiny/version_0/checkpoints/last.ckpt")) in capsys.readouterr().err
    run("fit", "-c", "tiny.yaml", "--trainer.max_epochs", "3", "--ckpt_path", "last")
    assert load(run_folder / "checkpoints" / "last.ckpt")["epoch"] == 2


def test_a_checkpoint_needs_no_file_that_its_training_started_from(run: Run, run_folder: Path) -> None:
    torch.save(load(run_folder / "checkpoints" / "last.ckpt")["state_dict"], "start.pth")
    run("fit", "-c", "tiny.yaml", "--model.init_from", "start.pth")
    Path("start.pth").unlink()
    run("test", "--ckpt_path", "runs/tiny/version_1/checkpoints/last.ckpt")
    options = ["-c", "tiny.yaml", "--model.init_from", "start.pth", "--trainer.max_epochs", "2"]
    run("fit", *options, "--ckpt_path", "runs/tiny/version_1/checkpoints/last.ckpt")
    assert load(Path("runs/tiny/version_1/checkpoints/last.ckpt"))["epoch"] == 1


def test_resuming_keeps_the_schedule_of_the_learning_rate(run: Run, workplace: Path) -> None:
    options = ["--model.schedule", "step", "--model.milestones", "[1,2]"]
    run("fit", "-c", "tiny.yaml", *options)
    run("fit", "-c", "tiny.yaml", *options, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    [optimizer] = load(Path("runs/tiny/version_0/checkpoints/last.ckpt"))["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.05 * 0.1 * 0.1)


def test_resuming_with_another_rate_says_that_the_optimizer_keeps_its_own(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", "-c", "tiny.yaml", "--trainer.max_epochs", "2", "--ckpt_path", "last", "--model.lr", "0.01")
    assert "use --model.init_from instead of --ckpt_path" in capsys.readouterr().err
    [optimizer] = load(run_folder / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == 0.05


def test_best_is_the_best_epoch_of_the_newest_run_even_when_moved(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = run_folder.with_name("version_1")
    shutil.copytree(run_folder, newer)  # its checkpoints say that the best one is in version_0
    for path in newer.rglob("*.ckpt"):
        os.utime(path, ns=(2**62, 2**62))
    run("test", "-c", "tiny.yaml", "--ckpt_path", "best")
    assert "checkpoint runs/tiny/version_1/checkpoints/best-e000.ckpt\n" in capsys.readouterr().err


def test_last_looks_where_runs_without_a_logger_are(run: Run, workplace: Path) -> None:
    options = ["-c", "tiny.yaml", "--trainer.logger", "false", "--trainer.default_root_dir", "here"]
    run("fit", *options)
    run("fit", *options, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    assert load(Path("here/checkpoints/last.ckpt"))["epoch"] == 1


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_run_that_does_not_exist_is_not_silently_started_anew(fails: Fails, name: str) -> None:
    message = fails("fit", "-c", "tiny.yaml", "--ckpt_path", name)
    assert f"Checkpoint {name}: there is no" in message
    assert "runs/tiny" in message
    assert not Path("runs").exists()


def test_last_is_the_newest_checkpoint_where_none_is_called_last(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "checkpoints" / "last.ckpt").unlink()
    best = run_folder / "checkpoints" / "best-e000.ckpt"
    shutil.copy(best, best.with_name("older.ckpt"))
    os.utime(best.with_name("older.ckpt"), ns=(0, 0))
    run("test", "-c", "tiny.yaml", "--ckpt_path", "last")
    assert "checkpoint runs/tiny/version_0/checkpoints/best-e000.ckpt\n" in capsys.readouterr().err
    run("check", "last")
    assert "checkpoint runs/tiny/version_0/checkpoints/best-e000.ckpt\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "given", "kept"),
    [
        (["--model.attention", "null"], "--model.attention None", "'dia-lstm'"),
        (["--model.attention", "se"], "--model.attention 'se'", "'dia-lstm'"),
        (["--model.attention_args.reduction", "2"], "--model.attention_args {'reduction': 2}", "None"),
        (["--model.backbone", "cifar_wrn"], "--model.backbone 'cifar_wrn'", "'cifar_resnet'"),
        (["--model.backbone_args.depth", "20"], "--model.backbone_args {'depth': 20}", "{'depth': 11}"),
        (["--model.share", "block"], "--model.share 'block'", "'stage'"),
        (["--model.identity", "true"], "--model.identity True", "False"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_another_network_than_the_checkpoints_is_one_line(
    fails: Fails, run_folder: Path, command: str, options: list[str], given: str, kept: str
) -> None:
    message = fails(command, "-c", "tiny.yaml", "--ckpt_path", "last", *options)
    assert message.startswith(f"{given} makes another network than that of the checkpoint, which has {kept}. To go on")
    assert "--model.init_from runs/tiny/version_0/checkpoints/last.ckpt instead of --ckpt_path" in message


def test_options_that_do_not_change_the_network_are_no_contradiction(run: Run, workplace: Path) -> None:
    run("fit", "-c", "tiny.yaml", "--model.attention", "null")
    run("test", "-c", "tiny.yaml", "--model.attention", "null", "--model.share", "block", "--ckpt_path", "last")
    run("test", "-c", "tiny.yaml", "--model.attention", "null", "--model.attention_args", "{}", "--ckpt_path", "last")


def test_a_unit_that_was_an_object_is_not_compared_with_its_name() -> None:
    check_fits({"attention": "mine"}, {"attention": "object:Mine"}, "x.ckpt")
    with pytest.raises(ValueError, match="another network"):
        check_fits({"attention": "mine"}, {"attention": "se"}, "x.ckpt")


def test_best_needs_a_monitored_checkpoint(fails: Fails, run_folder: Path) -> None:
    for path in run_folder.rglob("best*.ckpt"):
        path.unlink()
    assert "has no best checkpoint" in fails("test", "-c", "tiny.yaml", "--ckpt_path", "best")


def test_a_missing_file_is_one_line(fails: Fails) -> None:
    assert fails("test", "-c", "tiny.yaml", "--ckpt_path", "nowhere.ckpt").startswith(
        "Checkpoint nowhere.ckpt: there is no such file"
    )


@pytest.mark.parametrize("folder", [".", "checkpoints"])
@pytest.mark.parametrize("command", [["test", "-c", "tiny.yaml", "--ckpt_path"], ["analyze"]])
def test_the_folder_of_a_run_is_no_checkpoint(fails: Fails, run_folder: Path, command: list[str], folder: str) -> None:
    last = run_folder / "checkpoints" / "last.ckpt"
    message = fails(*command, str(run_folder / folder))
    assert message.endswith(f"is a folder of checkpoints. Give one of them, such as {last}.")


@pytest.mark.parametrize("url", ["http://example.com/a.ckpt", "https://example.com/a.ckpt", "s3://bucket/a.ckpt"])
def test_urls_are_refused(fails: Fails, url: str) -> None:
    assert "checkpoints are not loaded from URLs" in fails("validate", "-c", "tiny.yaml", "--ckpt_path", url)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"], ids=["empty", "html"])
def test_a_damaged_file_is_one_line(fails: Fails, content: bytes) -> None:
    Path("bad.ckpt").write_bytes(content)
    assert fails("validate", "-c", "tiny.yaml", "--ckpt_path", "bad.ckpt").startswith(
        "The checkpoint bad.ckpt cannot be read"
    )


def test_a_checkpoint_with_code_in_it_is_refused_whatever_the_environment_says(
    fails: Fails, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = run_folder / "checkpoints" / "last.ckpt"
    torch.save({**load(path), "code": Path("x")}, path)
    assert "cannot be read" in fails("validate", "-c", "tiny.yaml", "--ckpt_path", str(path))


def test_measuring_untrained_weights_is_not_silent(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("test", "-c", "tiny.yaml")
    assert "no --ckpt_path: using the network as it is built" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_one_sentence() -> None:
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    with pytest.raises(RuntimeError) as raised:
        large.load_state_dict(small.state_dict())
    assert misfit(str(raised.value), "x.ckpt") == (
        "The weights of x.ckpt do not fit the network of this command (2 differ, the first: weight, size mismatch). "
        "To use them give the options that the network was trained with."
    )


def test_a_run_that_was_never_validated_has_no_best_checkpoint(tmp_path: Path) -> None:
    record = {"ModelCheckpoint": {"monitor": "val/map", "best_model_path": ""}}
    torch.save({"callbacks": record}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="has no best checkpoint, perhaps because it was never validated"):
        find_checkpoint("best", [tmp_path])


def test_the_folder_of_a_run_is_found_from_any_of_its_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints" / "version_0"  # a folder above of the same name is another one
    (run / "checkpoints").mkdir(parents=True)
    assert run_folder_of(run / "checkpoints" / "last.ckpt") == run
    assert run_folder_of(run / "copy.ckpt") == run
    (run / "config.yaml").touch()
    assert run_folder_of(run / "checkpoints" / "epoch=1-val" / "acc=0.9.ckpt") == run
