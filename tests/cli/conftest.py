"""One small training run, and `main` called as a user would call it, in a folder of its own."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dia_lightning.__main__ import main

CONFIG = """\
trainer:
  accelerator: cpu
  max_epochs: 1
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: runs, name: tiny}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {monitor: val/acc, mode: max, filename: "best-e{epoch:03d}", auto_insert_metric_name: false}
    - class_path: ModelCheckpoint
      init_args: {filename: last, enable_version_counter: false}
model:
  class_path: ClassificationTask
  init_args:
    backbone: cifar_resnet
    backbone_args: {depth: 11}
    attention: dia-lstm
    lr: 0.05
    momentum: 0.8
    weight_decay: 1e-3
data:
  class_path: DigitsDataModule
  init_args: {image_size: 8, batch_size: 10, limit: 20}
"""
#: The same without a value for the model, so that all come from somewhere else.
BARE = CONFIG.partition("  init_args:\n    backbone:")[0] + "data:\n" + CONFIG.partition("data:\n")[2]

Run = Callable[..., None]


def call(*args: str) -> None:
    """Runs the program in this process, without pytest's own arguments in sight."""
    argv, sys.argv = sys.argv, ["dia-lightning"]
    try:
        main(list(args))
    finally:
        sys.argv = argv


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `fit -c tiny.yaml` has run once; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("tiny.yaml").write_text(CONFIG)
        Path("bare.yaml").write_text(BARE)
        call("fit", "-c", "tiny.yaml")
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the tiny configs."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "bare.yaml").write_text(BARE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_folder(trained: Path, workplace: Path) -> Path:
    """The folder of a finished run inside the working folder."""
    shutil.copytree(trained / "runs", workplace / "runs")
    return workplace / "runs" / "tiny" / "version_0"


@pytest.fixture
def run(workplace: Path) -> Run:
    """Calls the program in the working folder."""
    return call


@pytest.fixture
def fails(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the program, expects exit code 2, returns the one line that it prints on stderr."""

    def run_and_fail(*args: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            call(*args)
        assert exit_info.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dia-lightning: error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("dia-lightning: error: ")

    return run_and_fail
