"""The jobs and templates under ``.github`` are correct, as far as can be checked without GitHub."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(path.read_text())
    return content


@pytest.fixture(params=[(path.name, job) for path in WORKFLOWS for job in read(path)["jobs"]], ids="-".join)
def job(request: pytest.FixtureRequest) -> dict[str, Any]:
    name, job = request.param
    found: dict[str, Any] = read(ROOT / ".github/workflows" / name)["jobs"][job]
    return found


def test_a_job_runs_scripts_of_the_repository(job: dict[str, Any]) -> None:
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        script = ROOT / command.split()[0]
        assert script.parent == ROOT / ".ci"
        assert os.access(script, os.X_OK)


def test_a_job_ends_and_takes_fixed_actions(job: dict[str, Any]) -> None:
    assert 0 < job["timeout-minutes"] <= 60
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_the_oldest_python_that_is_supported_is_tested() -> None:
    jobs = read(ROOT / ".github/workflows/tests.yml")["jobs"]
    tested = jobs["newest"]["strategy"]["matrix"]["python"]
    oldest = re.search(r'^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert oldest is not None
    assert tested[0] == oldest[1]
    assert all(isinstance(version, str) for version in tested)  # 3.10 without quotes is 3.1


def test_extras_that_are_tested_alone_exist() -> None:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for extra in filter(
        None, read(ROOT / ".github/workflows/tests.yml")["jobs"]["bare"]["strategy"]["matrix"]["extras"]
    ):
        assert re.search(rf"^{extra} = \[", extras, re.MULTILINE)


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_for(path: Path) -> None:
    form = read(path)
    assert form["name"]
    assert form["description"]
    fields = [entry for entry in form["body"] if entry["type"] != "markdown"]
    assert len({entry["id"] for entry in fields}) == len(fields)
    assert all(entry["attributes"]["label"] for entry in fields)
    assert any(entry.get("validations", {}).get("required") for entry in fields)
