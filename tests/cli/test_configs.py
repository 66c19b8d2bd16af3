"""Configs come with the package: any folder has them by name, and a file of the working folder counts first."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dia_lightning import _config_files
from dia_lightning.__main__ import main
from dia_lightning._config_files import config_names, find_config

CONFIGS = Path(__file__).parents[2] / "configs"
NAME = "classification/digits.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dia-lightning"])
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", [NAME, f"configs/{NAME}", f"./{NAME}"])
def test_a_packaged_config_is_found_by_name(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "-c", name, "-c", "trainer/smoke.yaml", "--print_config"])
    assert exit_info.value.code in (0, None)
    printed = capsys.readouterr()
    config = yaml.safe_load(printed.out)
    assert config["data"]["class_path"].endswith("DigitsDataModule")
    assert config["trainer"]["limit_train_batches"] == 2


def test_a_file_of_the_working_folder_counts_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = folder / NAME
    own.parent.mkdir()
    own.write_text((CONFIGS / NAME).read_text().replace("share: stage", "share: block"))
    assert find_config(NAME) == Path(NAME)
    with pytest.raises(SystemExit):
        main(["fit", "-c", NAME, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["share"] == "block"
    main(["reproduce", "reproduce/digits_sharing.yaml", "--dry_run"])
    assert "fit -c configs/classification/digits.yaml" in capsys.readouterr().out


def test_the_run_says_which_file_of_the_package_it_took(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.backbone_args.depth", "11", "--data.limit", "8", "--data.batch_size", "4"]
    main(["fit", "-c", NAME, "--trainer.fast_dev_run", "1", *small])
    assert f"dia-lightning: config {CONFIGS / NAME}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "args", [("fit", "-c"), ("reproduce",), ("configs",), ("fit", "-c", NAME, "-c")], ids=lambda args: " ".join(args)
)
def test_a_missing_one_names_both_places_and_the_nearest(
    args: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, *args, "classification/digit.yaml")
    assert "There is no file classification/digit.yaml." in line
    assert f"Did you mean {NAME} or " in line
    assert f"Looked in {folder} and among the package's configs in {CONFIGS}" in line


def test_nothing_outside_of_the_folder_is_taken_for_a_packaged_one(folder: Path) -> None:
    for name in ("../pyproject.toml", f"classification/../{NAME}", "/" + NAME, "", ".", "classification", "x" * 5000):
        assert find_config(name) == Path(name)


def test_all_configs_are_listed_with_their_first_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    files = {path.relative_to(CONFIGS).as_posix(): path.read_text().splitlines()[0] for path in CONFIGS.rglob("*.yaml")}
    assert {line.split()[0]: "# " + line.partition("  ")[2].strip() for line in lines} == files
    main(["configs", "sweeps/digits.yaml"])
    assert Path(capsys.readouterr().out.strip()).read_text() == (CONFIGS / "sweeps" / "digits.yaml").read_text()


def test_every_config_that_another_names_is_there() -> None:
    for name in config_names():
        content = yaml.safe_load((CONFIGS / name).read_text())
        named = [*content.get("base", ()), *(item for item in content.get("command", ()) if item.endswith(".yaml"))]
        assert all(item.removeprefix("configs/") in config_names() for item in named)


def test_an_installed_package_has_its_configs_inside(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "dia_lightning"
    (package / "configs" / "trainer").mkdir(parents=True)
    (package / "configs" / "trainer" / "inside.yaml").write_text("# One.\n")
    (package.parent / "configs" / "trainer").mkdir(parents=True)  # of some other package
    for name in ("__init__.py", "_config_files.py"):
        (package / name).write_text("" if "_config" not in name else Path(_config_files.__file__).read_text())
    code = "from dia_lightning._config_files import config_names; print(*config_names())"
    done = subprocess.run([sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True)
    assert done.stdout.split() == ["trainer/inside.yaml"], done.stderr
