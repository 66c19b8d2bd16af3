"""Files that appear under their names only once complete, whatever happens to the program or the disk."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where open files cannot be removed
    fcntl = None  # type: ignore[assignment]

_PART = re.compile(r"\..*\.\d+\.part")


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path next to ``path`` to write to; at the end of the context the file there replaces ``path``.

    After an error, a signal or a power cut ``path`` is unchanged. :func:`remove_parts` removes what SIGKILL leaves.

    Raises:
        OSError: if the file cannot be written to the folder or disk.
    """
    target = Path(path)
    part = target.with_name(f".{target.name[:50]}.{os.getpid()}.part")  # short: file names have limits
    with _claimed(part):
        try:
            yield part
            put_in_place(part, target)
        finally:
            part.unlink(missing_ok=True)


def put_in_place(part: Path, target: Path) -> None:
    """Rename a complete file within a folder or disk, so that a power cut leaves the old one or the new one.

    Raises:
        OSError: if it cannot be written to the disk.
    """
    with open(part, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    if fcntl is not None:  # Windows cannot open folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def written_with_others(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path of the same name in a folder next to ``path``, for writers that choose a format by the name.

    At the end of the context everything in that folder is moved into place, ``path`` last: some formats keep large
    weights in other files.

    Raises:
        OSError: if a file cannot be written to the folder or disk.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name[:50]}.", dir=target.parent) as folder:
        made = Path(folder, target.name)
        yield made
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == made):
            put_in_place(file, target.with_name(file.name))


def remove_parts(roots: Iterable[Path]) -> list[Path]:
    """Remove what killed programs have left below some folders, but not what is being written.

    Returns:
        What was removed.
    """
    found = {part for root in roots for part in root.rglob(".*.part") if _PART.fullmatch(part.name)}
    return [part for part in sorted(found) if part.is_file() and _is_removed(part)]


@contextmanager
def _claimed(part: Path) -> Iterator[None]:
    """Create a file and lock it for the life of the process, whose id may be reused, also on another machine."""
    while True:
        file = open(part, "wb")  # noqa: SIM115  several ways out
        if fcntl is None:
            file.close()
            break
        _lock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # otherwise it was removed in between
            break
        file.close()
    with file:
        yield


def _is_removed(part: Path) -> bool:
    try:
        with open(part, "r+b") as file:
            if fcntl is not None and not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            if fcntl is not None:
                part.unlink()
        part.unlink(missing_ok=True)
    except OSError:  # someone else's, or gone
        return False
    return True


def _lock(file: BinaryIO, how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except OSError:  # held, or the disk has no locks
        return False
    return True
