import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

from dia_lightning.datamodules import _download
from dia_lightning.datamodules._download import Archive, obtain


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """An archive with one file in it, on a "mirror"."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "inside.txt").write_text("42")
    with tarfile.open(mirror / "data.tar.gz", "w:gz") as tar:
        tar.add(mirror / "inside.txt", "inside.txt")
    return mirror / "data.tar.gz"


def _archive(good: Path, *urls: str) -> Archive:
    return Archive("data.tar.gz", hashlib.md5(good.read_bytes()).hexdigest(), urls, "DIA_TEST_URL")


def test_archive_is_fetched_checked_and_unpacked(tmp_path: Path, good: Path) -> None:
    obtain(_archive(good, good.as_uri()), tmp_path / "root", download=True)
    assert (tmp_path / "root" / "inside.txt").read_text() == "42"


def test_mirrors_are_tried_in_order_after_the_users_own(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def save(url: str, path: Path) -> None:
        tried.append(url)
        if url != "http://c":
            raise OSError("unreachable")
        path.write_bytes(good.read_bytes())

    monkeypatch.setattr(_download, "_save", save)
    monkeypatch.setenv("DIA_TEST_URL", "http://own")
    obtain(_archive(good, "http://a", "http://b", "http://c", "http://d"), tmp_path / "root", download=True)
    assert tried == ["http://own", "http://a", "http://b", "http://c"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(
    tmp_path: Path, good: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    _download._save(good.as_uri(), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == good.read_bytes()
    assert ("100%" in screen.getvalue()) == terminal
    assert terminal or screen.getvalue() == ""


def test_users_own_folder_is_completed_by_the_file_name(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIA_TEST_URL", "http://own/folder/")
    assert _archive(good, "http://a").candidates() == ["http://own/folder/data.tar.gz", "http://a"]


def test_wrong_content_is_not_used_and_the_next_place_is_tried(tmp_path: Path, good: Path) -> None:
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(b"<html>404</html>")
    obtain(_archive(good, wrong.as_uri(), good.as_uri()), tmp_path / "root", download=True)
    assert (tmp_path / "root" / "inside.txt").exists()


def test_archive_that_is_there_is_unpacked_without_a_connection(tmp_path: Path, good: Path, no_network: None) -> None:
    obtain(_archive(good, "http://a"), good.parent, download=False)
    assert (good.parent / "inside.txt").exists()


def test_failure_names_folder_url_md5_and_override_in_one_line(tmp_path: Path, good: Path) -> None:
    missing = (tmp_path / "gone.tar.gz").as_uri()
    archive = _archive(good, "no url at all", missing)
    with pytest.raises(FileNotFoundError) as error:
        obtain(archive, tmp_path / "root", download=True)
    message = str(error.value)
    for part in (str(tmp_path / "root"), "no url at all", missing, archive.md5, "$DIA_TEST_URL"):
        assert part in message
    assert "\n" not in message


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path, good: Path) -> None:
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match="wrong md5"):
        obtain(_archive(good, wrong.as_uri()), tmp_path / "root", download=True)
    assert list((tmp_path / "root").iterdir()) == []


def test_download_false_never_connects(tmp_path: Path, good: Path, no_network: None) -> None:
    with pytest.raises(FileNotFoundError, match="download=False"):
        obtain(_archive(good, "http://a"), tmp_path / "root", download=False)
