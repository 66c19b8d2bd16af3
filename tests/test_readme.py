"""Commands of the README and the pages run as written. Their Python examples are doctests."""

import re
import shlex
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from dia_lightning.__main__ import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
#: In the order of the commands: each may use the results of those before it.
PAGES = [
    README,
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "index",
            "start",
            "your-project",
            "any-network",
            "classification",
            "detection",
            "diffusion",
            "sharing",
            "command-line",
            "analysis",
            "reproduce",
            "wandb",
            "faq",
            "extending",
            "architecture",
            "citing",
        )
    ),
]
#: Measured over hours, or on other machines: the files their commands name must exist.
MEASURED = [ROOT / "docs" / f"{name}.md" for name in ("networks", "performance", "reliability", "results")]
TEXTS = {page: page.read_text(encoding="utf-8") for page in (*PAGES, *MEASURED)}


def blocks(language: str, pages: Iterable[Path] = PAGES) -> list[str]:
    """Return the code blocks in a language, in the order of the pages."""
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)]


SHELL = [line for block in blocks("sh") for line in block.splitlines()]
#: A command that stands on several pages runs once.
COMMANDS = [
    list(command)
    for command in dict.fromkeys(
        tuple(shlex.split(line, comments=True)[1:]) for line in SHELL if line.startswith("dia-lightning")
    )
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs, and photos to predict."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dia-lightning"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    Image.new("L", (20, 20), 128).save(tmp_path / "photos" / "grey.png")
    for name, count in {"cat": 10, "dog": 32}.items():
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 30), (6 * i, 90, 30)).save(tmp_path / "pets" / "train" / name / f"{i}.jpg")
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    return tmp_path


def test_the_two_commands_set_everything_up_themselves() -> None:
    first, second = dict.fromkeys(line for line in SHELL if line.startswith("python3 -m venv"))
    setup = "python3 -m venv .venv && .venv/bin/python -m pip install -e '.[test]' && .venv/bin/python -m "
    assert first == f"{setup}dia_lightning fit -c configs/classification/digits.yaml"
    assert second == f"{setup}pytest -n auto"


@pytest.mark.slow
def test_the_quick_start_reads_digits(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--data.image_size", "8", "--trainer.enable_progress_bar", "false"]  # a quarter of the pixels
    main(["fit", "-c", "configs/classification/digits.yaml", *quick])
    printed = capsys.readouterr().out
    accuracy = re.search(r"test/acc +([\d.]+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.97
    for name in ("best checkpoint:", "pictures:", "predictions:"):
        path = re.search(rf"{name} +(\S+)", printed)
        assert path is not None
        assert (workplace / path[1]).exists()


@pytest.mark.slow
def test_every_command_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {command[0] for command in COMMANDS} >= {"fit", "test", "predict", "models", "check", "export"}
    for command in COMMANDS:
        quick = ["--trainer.enable_progress_bar", "false"] if command[0] in ("fit", "test", "predict") else []
        if command[0] == "fit":
            quick += ["-c", "configs/trainer/smoke.yaml"]
        if "pets" in command:
            quick += ["--data.image_size", "32"]
        main([*command, *quick])
    assert (workplace / "network.onnx").is_file()
    assert (workplace / "digits_pipeline" / "model_index.json").is_file()
    assert list((workplace / "runs" / "wandb").glob("offline-run-*"))
    for results in ("predictions*.csv", "detections*.images.json"):
        assert "photos/grey.png" in "".join(path.read_text() for path in workplace.rglob(results))


def test_fine_tuning_in_python_leaves_the_body_alone(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [block for block in blocks("python") if ">>>" not in block]  # the others are doctests
    names: dict[str, Any] = {}
    exec(example.replace("image_size=224", "image_size=32"), names)
    assert "34 tensors were trained, 32 of them attention" in capsys.readouterr().out
    weights, task = torch.load("resnet18.pth"), names["task"]
    tuned = {name.removeprefix("backbone."): value for name, value in task.state_dict().items()}
    changed = {name for name, value in weights.items() if not name.startswith("fc.") and not value.equal(tuned[name])}
    assert not changed
    assert [group["name"] for group in task.optimizers().param_groups] == ["main", "attention"]


def test_the_configs_named_on_the_pages_exist() -> None:
    for names in re.findall(r"^\| (`.*?`) \|", "\n".join(TEXTS[page] for page in PAGES), re.MULTILINE):
        for name in re.findall(
            r"`((?:classification|detection|diffusion|scores|reproduce|sweeps|logger|trainer)/[\w*.]+)`", names
        ):
            assert list((ROOT / "configs").glob(name)), name


def test_the_specification_of_a_comparison_can_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [specification] = blocks("yaml")
    Path("spec.yaml").write_text(specification)
    main(["reproduce", "spec.yaml", "--dry_run"])
    assert capsys.readouterr().out.count("dia-lightning fit") == 9


def test_every_block_is_of_a_kind_that_runs() -> None:
    known = {"sh", "python", "yaml", "bibtex", "{toctree}"}
    for page in PAGES:
        assert set(re.findall(r"^```(\S+)$", TEXTS[page], re.MULTILINE)) <= known, page.name
        assert TEXTS[page].count("\n```") % 2 == 0, page.name
    for line in SHELL:
        assert line.startswith(("dia-lightning ", "python3 -m venv ", "# ")), line


def test_files_named_by_measured_commands_exist() -> None:
    text = "\n".join(blocks("sh", MEASURED))
    for name in set(re.findall(r"configs/[\w/.]+\.yaml", text)):
        assert (ROOT / name).is_file(), name
    for module in set(re.findall(r"python -m ((?:benchmarks|docs)\.\w+)", "\n".join(TEXTS.values()))):
        assert find_spec(module) is not None, module


def test_every_page_is_in_the_site_and_every_link_leads_to_one() -> None:
    pages = {page.stem: page for page in (ROOT / "docs").glob("*.md")}
    listed = set(re.findall(r"^([\w-]+)$", "".join(blocks(r"\{toctree\}", [ROOT / "docs" / "index.md"])), re.MULTILINE))
    assert listed == set(pages) - {"index"}
    for page in TEXTS:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXTS[page]):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("[!i]*.md")), ids=lambda page: page.stem)
def test_every_public_name_is_on_a_page(page: Path) -> None:
    described = re.findall(r"^\.\. (?:auto\w+|data):: (\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(described) == sorted(import_module(f"dia_lightning.{page.stem}").__all__)


def test_every_public_package_has_a_page() -> None:
    packages = {path.parent.name for path in (ROOT / "dia_lightning").glob("*/__init__.py")}
    of_the_program = {"cli", "reproduce"}
    assert {page.stem for page in (ROOT / "docs" / "api").glob("[!i]*.md")} == packages - of_the_program


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= 8 * 1024


def test_tests_that_pages_name_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"\btest_\w+\.py", page.read_text(encoding="utf-8"))}
    assert "test_exact_resume.py" in named
    assert named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
