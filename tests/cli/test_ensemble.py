"""Several checkpoints as one classifier, from the command line."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from dia_lightning.cli import _ensemble
from dia_lightning.cli._ensemble import ensemble_of, member_paths
from dia_lightning.tasks import DIATask
from tests.cli.conftest import Run

Fails = Callable[..., str]


def test_checkpoints_are_tested_together_and_one_by_one(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, best = (next((run_folder / "checkpoints").glob(f"{name}*.ckpt")) for name in ("last", "best"))
    run("test", "-c", "tiny.yaml", "--ensemble", f"{last},{best}")
    assert f"member0 is {last}\n" in (said := capsys.readouterr().err)
    assert f"member1 is {best}\n" in said
    (metrics,) = csv.DictReader((run_folder.parent / "version_1" / "metrics.csv").open())
    assert metrics["test/member0/acc"] == metrics["test/member1/acc"] == metrics["test/acc"]  # of one epoch
    parts = float(metrics["test/brier_members"]) - float(metrics["test/ambiguity"])
    assert float(metrics["test/brier"]) == pytest.approx(parts, rel=1e-4)


def test_a_list_and_a_text_mean_the_same(run_folder: Path) -> None:
    last, best = (str(next((run_folder / "checkpoints").glob(f"{name}*.ckpt"))) for name in ("last", "best"))
    assert member_paths([last, best], []) == member_paths(f"{last}, {best}", []) == [last, best]
    assert Path(member_paths([last, "best"], [Path("runs")])[1]).samefile(best)


def test_what_makes_no_ensemble_is_refused(run_folder: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    last = str(run_folder / "checkpoints" / "last.ckpt")
    assert "exclude each other" in fails("test", "-c", "tiny.yaml", "--ensemble", f"{last},best", "--ckpt_path", last)
    assert "Train its members one by one" in fails("fit", "-c", "tiny.yaml", "--ensemble", f"{last},best")
    for given, message in (
        (f"{last},{last}", "comes twice"),
        ([last], f"there is only {last}"),
        ([], "there is only nothing"),
        (f"{last},none.ckpt", "Checkpoint none.ckpt: there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            member_paths(given, [])
    monkeypatch.setattr(_ensemble, "task_of_run", lambda path: DIATask())
    with pytest.raises(ValueError, match=r"--ensemble is for classification, but a\.ckpt holds a DIATask"):
        ensemble_of(["a.ckpt", "b.ckpt"])
