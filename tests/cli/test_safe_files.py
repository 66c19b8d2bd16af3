"""Runs after a kill, a full disk or damage."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from dia_lightning.__main__ import main
from dia_lightning.callbacks import SafeCheckpointIO
from dia_lightning.cli._errors import is_for_the_user, message_of
from tests.cli.conftest import Run

Fails = Callable[..., str]


@pytest.mark.parametrize("broken", [b"", b"<html>", b"PK\x03\x04 and so on", b"not found"])
@pytest.mark.parametrize("command", ["validate", "fit"])
def test_last_falls_back_to_the_newest_older_whole_file_with_one_line(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str], command: str, broken: bytes
) -> None:
    newer = run_folder.with_name("version_1") / "checkpoints" / "last.ckpt"
    newer.parent.mkdir(parents=True)
    newer.write_bytes(broken)
    run(command, "-c", "tiny.yaml", "--ckpt_path", "last")
    said = [line for line in capsys.readouterr().err.splitlines() if "newest older one" in line]
    assert len(said) == 1
    assert said[0].endswith("using runs/tiny/version_0/checkpoints/last.ckpt, the newest older one that is whole")


def test_a_path_to_a_damaged_file_is_refused_with_another_to_take(fails: Fails, run_folder: Path) -> None:
    last = run_folder / "checkpoints" / "last.ckpt"
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    copy = Path("copy.ckpt")
    shutil.copy2(last, copy)
    last.write_bytes(damaged)
    os.utime(copy, (1, 1))
    (best,) = last.parent.glob("best*.ckpt")
    message = fails("validate", "-c", "tiny.yaml", "--ckpt_path", str(last))
    assert message.endswith(f"The newest older checkpoint that is whole is {best}.")


def test_a_start_removes_what_a_killed_run_has_left(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = run_folder / "checkpoints" / ".last.ckpt.1234567.part"
    left.write_bytes(b"half")
    run("validate", "-c", "tiny.yaml", "--ckpt_path", "last")
    assert not left.exists()
    assert "checkpoints/.last.ckpt.1234567.part, which a killed run had left" in capsys.readouterr().err


def test_a_full_disk_wherever_it_is_met_is_one_line(
    monkeypatch: pytest.MonkeyPatch, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning.pytorch.loggers.csv_logs.ExperimentWriter.save", is_full)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", "tiny.yaml"])
    assert stopped.value.code == 2
    assert "Make room, or give a folder that can be written to." in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES"])
def test_what_a_disk_refuses_names_the_place(name: str) -> None:
    import errno

    error = OSError(getattr(errno, name), "refused", "runs/digits")
    assert is_for_the_user(error)
    assert message_of(error) == "refused: runs/digits. Make room, or give a folder that can be written to."


def test_urls_and_folders_are_refused_in_python_too(tmp_path: Path) -> None:
    for path in ("http://example.com/a.ckpt", "s3://bucket/a.ckpt", str(tmp_path)):
        with pytest.raises(ValueError, match=r"not loaded from URLs|sharded checkpoint"):
            SafeCheckpointIO().load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        SafeCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_the_plugins_of_the_options_count(run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    save = Trainer.save_checkpoint

    def noted(trainer: Trainer, *args: object, **options: object) -> None:
        kinds.append(type(trainer.strategy.checkpoint_io).__name__)
        save(trainer, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "save_checkpoint", noted)
    plugin = "lightning.pytorch.plugins.io.TorchCheckpointIO"
    run("fit", "-c", "tiny.yaml")
    run("fit", "-c", "tiny.yaml", f"--trainer.plugins={plugin}")
    assert sorted(set(kinds)) == ["SafeCheckpointIO", "TorchCheckpointIO"]
