"""The notebooks run, and hold the outputs of such a run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes: a page that a browser shows at once
PATH_OF_A_MACHINE = re.compile(r"(?<![\w.:/-])/(home|opt|private|root|tmp|usr|Users|var|work)/|\b[A-Z]:\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    """Return a notebook."""
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def code_cells(notebook: Any) -> list[Any]:
    """Return the cells that can be run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> Iterator[Any]:
    """Return the outputs of all cells."""
    return (output for cell in code_cells(notebook) for output in cell.outputs)


def kinds(notebook: Any) -> list[set[str]]:
    """Return what each cell shows: text, errors, figures."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", [output.output_type])}
        for cell in code_cells(notebook)
    ]


def test_there_are_five_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.slow
@each_notebook
def test_it_runs_and_shows_what_is_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))  # without the user's settings, and leaving nothing behind
    folder = tmp_path / "folder"
    folder.mkdir()
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.source = re.sub(r"max_epochs=\d+", "max_epochs=1", cell.source)  # more epochs run the same code
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=place).execute()  # raises what a cell raises
    assert kinds(notebook) == kinds(read(path))
    assert list(folder.iterdir()) == []  # running a notebook leaves no files next to it


@each_notebook
def test_it_was_run_from_top_to_bottom(path: Path) -> None:
    counts = [cell.execution_count for cell in code_cells(read(path))]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_figures_are_kept_as_pictures(path: Path) -> None:
    notebook = read(path)
    figures = [output.data for output in outputs(notebook) if "<Figure" in output.get("data", {}).get("text/plain", "")]
    assert all("image/png" in data for data in figures)
    drawn = any(re.search(r"subplots\(|draw_\w+\(", cell.source) for cell in code_cells(notebook))
    assert bool(figures) == drawn


@each_notebook
def test_it_keeps_no_errors_warnings_or_widgets(path: Path) -> None:
    notebook = read(path)
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs(notebook) if output.output_type == "stream"} == {"stdout"}
    assert "widgets" not in notebook.metadata
    assert not any("widget" in kind for cell in kinds(notebook) for kind in cell)


@each_notebook
def test_it_names_no_path_of_the_machine_that_it_was_run_on(path: Path) -> None:
    notebook = read(path)
    texts = [cell.source for cell in notebook.cells]
    texts += [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook)]
    for text in texts:
        assert PATH_OF_A_MACHINE.search(text) is None, text


@each_notebook
def test_it_is_small_enough_for_a_web_page(path: Path) -> None:
    assert path.stat().st_size < LARGEST


@each_notebook
def test_files_of_the_repository_that_it_names_exist(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = [path.parent / target for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    names = [path.parents[1] / name for name in re.findall(r"\b(?:configs|docs)/[\w/]+\.\w+", text)]
    for target in (*links, *names):
        assert target.is_file(), target
