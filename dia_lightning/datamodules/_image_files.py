"""The image files of a folder, and its other files."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dia_lightning.datamodules._formats import count_by_ending, ending, is_hidden, readable_endings

_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class ImageFiles:
    """Image files, in the order of their paths.

    Args:
        paths: of the files.
        inodes: a number per file, equal for names of one file; see :func:`inode`.
        left_out: number of files by ending that are not readable images, without notes and hidden files.
    """

    paths: list[str] = field(default_factory=list)
    inodes: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def joined(parts: Sequence[ImageFiles]) -> ImageFiles:
    """Return the files of several folders, one after the other."""
    paths = [path for part in parts for path in part.paths]
    left_out: Counter[str] = Counter()
    for part in parts:
        left_out.update(part.left_out)
    return ImageFiles(paths, [number for part in parts for number in part.inodes], left_out)


def inode(status: os.stat_result) -> int:
    """Return a number that two names of one file (links, other spellings) share."""
    return status.st_ino & _LARGEST


def find_images(folder: Path, *, deep: bool = True) -> ImageFiles:
    """Find the image files of a folder and its subfolders, without opening them.

    Hidden files and folders, and those that systems and archives leave behind, are skipped.

    Args:
        folder: where to look.
        deep: whether to search subfolders too.

    Raises:
        FileNotFoundError: if a file is a symbolic link whose target is gone.
    """
    found: list[tuple[str, int]] = []
    left_out: Counter[str] = Counter()
    _walk(str(folder), readable_endings(), found, left_out, parents=() if deep else None)
    found.sort()
    return ImageFiles([path for path, _ in found], [number for _, number in found], left_out)


def images_at(place: Path) -> ImageFiles:
    """Find the images to predict: those of a folder, or a single file of any ending.

    Raises:
        FileNotFoundError: if there is neither.
    """
    if place.is_dir():
        return find_images(place)
    if not place.is_file():
        raise FileNotFoundError(f"predict_folder={place} is neither a folder nor an image file.")
    return ImageFiles([str(place)], [inode(place.stat())])  # of any ending, because it was asked for


def has_images(folder: Path) -> bool:
    """Return whether a folder directly contains image files."""
    endings = readable_endings()
    with os.scandir(folder) as entries:
        return any(ending(entry.name) in endings and not is_hidden(entry.name) and entry.is_file() for entry in entries)


def folders_in(folder: Path, *, whole: bool = False) -> list[str]:
    """Return the sorted names of the folders in a folder, without hidden ones.

    Args:
        folder: where to look, not deeper.
        whole: refuse symbolic links whose target is gone, which may have been folders.

    Raises:
        FileNotFoundError: if ``whole`` and there is such a link.
    """
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif whole:
                _inode(entry)  # refuses a broken link
    return sorted(names)


def _walk(
    folder: str,
    endings: frozenset[str],
    found: list[tuple[str, int]],
    left_out: Counter[str],
    *,
    parents: Sequence[str] | None,
) -> None:
    others: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                above = None if parents is None else (*parents, os.path.realpath(folder))
                # A link to a parent folder would be followed forever.
                if above is not None and not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                    _walk(entry.path, endings, found, left_out, parents=above)
            elif ending(entry.name) in endings:
                found.append((entry.path, _inode(entry)))
            else:
                others.append(entry.name)
    left_out.update(count_by_ending(others))


def _inode(entry: "os.DirEntry[str]") -> int:
    if not entry.is_symlink():
        return entry.inode() & _LARGEST  # known without asking the disk again
    if not os.path.exists(entry.path):
        raise FileNotFoundError(f"{entry.path} is a broken link to {os.readlink(entry.path)}. Repair it.")
    return inode(os.stat(entry.path))
