"""The audit of installed packages before a release: what counts as a finding, and what as unknown."""

import json
import runpy
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "audit.py"))
Find = Callable[..., list[tuple[str, bool]]]


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Find:
    """Audit a release with a given answer from the index; an error is raised instead of an answer."""

    def find(files: Any, vulnerabilities: Any, excepted: dict[str, date] | None = None) -> list[tuple[str, bool]]:
        def answer(path: str) -> Any:
            given = files if path.startswith("/simple/") else vulnerabilities
            if isinstance(given, Exception):
                raise given
            return {"files": given} if path.startswith("/simple/") else {"vulnerabilities": given}

        monkeypatch.setitem(SCRIPT["audit"].__globals__, "_answer", answer)
        return list(SCRIPT["audit"]("Some_Package", "1.2", excepted or {}))

    return find


def file(name: str = "some_package-1.2-py3-none-any.whl", days: float = 30, yanked: Any = False) -> dict[str, Any]:
    uploaded = datetime.now(timezone.utc) - timedelta(days=days)
    return {"filename": name, "upload-time": uploaded.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), "yanked": yanked}


HOLE = {"id": "GHSA-1", "aliases": ["CVE-1"], "fixed_in": ["1.3"], "link": "https://x", "withdrawn": None}


def test_an_old_release_without_known_holes_is_not_a_finding(find: Find) -> None:
    others = [file("some-package-1.20.tar.gz", days=0), file("some_package_more-1.2.tar.gz", days=0, yanked=True)]
    assert find([file(), file("some.package-1.2.tar.gz"), *others], [HOLE | {"withdrawn": "2026-01-01"}]) == []


@pytest.mark.parametrize(
    ("files", "holes", "word"),
    [
        ([file(days=6.9)], [], "6 days old"),
        ([file(), file("some-package-1.2.tar.gz", days=1)], [], "1 days old"),
        ([file(yanked="malware")], [], "malware"),
        ([file("some-package-1.3.tar.gz")], [], "does not have this release"),
        ([file()], [HOLE], "CVE-1 GHSA-1, fixed in 1.3"),
    ],
)
def test_young_withdrawn_and_vulnerable_releases_are_findings(find: Find, files: Any, holes: Any, word: str) -> None:
    [(line, is_known)] = find(files, holes)
    assert word in line
    assert is_known


def test_an_index_that_does_not_answer_is_not_green(find: Find) -> None:
    gone = HTTPError("https://x", 404, "Not Found", None, None)  # type: ignore[arg-type]
    assert [is_known for _, is_known in find(gone, OSError("no network"))] == [False, False]
    assert [is_known for _, is_known in find([file()], json.JSONDecodeError("html", "<", 0))] == [False]


@pytest.mark.parametrize(
    ("lines", "code"), [([], 0), ([("unknown", False)], 3), ([("unknown", False), ("a hole", True)], 1)]
)
def test_the_exit_code_tells_findings_from_not_knowing(
    monkeypatch: pytest.MonkeyPatch, lines: list[tuple[str, bool]], code: int
) -> None:
    monkeypatch.setitem(SCRIPT["main"].__globals__, "audit", lambda *_: lines)
    assert SCRIPT["main"](["pytest"]) == code


def test_an_exception_ends_on_its_day(find: Find, tmp_path: Path) -> None:
    path = tmp_path / "exceptions.txt"
    path.write_text("# what for\n\nCVE-1 2026-12-31 the range is wrong\n")
    assert find([file()], [HOLE], SCRIPT["read_exceptions"](path, date(2026, 12, 31))) == []
    assert len(find([file()], [HOLE], SCRIPT["read_exceptions"](path, date(2027, 1, 1)))) == 1
    path.write_text("CVE-1 for ever\n")
    with pytest.raises(ValueError, match="ID DATE REASON"):
        SCRIPT["read_exceptions"](path, date(2027, 1, 1))
