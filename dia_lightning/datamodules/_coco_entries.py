"""Match the entries of an annotation file with the files on disk: every image once."""

import os
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dia_lightning.datamodules._annotated_files import Objects
from dia_lightning.datamodules._coco_file import CocoFile
from dia_lightning.datamodules._enclosure import Enclosure
from dia_lightning.datamodules._formats import ending, is_hidden, readable_endings
from dia_lightning.datamodules._image_files import inode
from dia_lightning.datamodules._images import image_size
from dia_lightning.datamodules._spellings import FileFinder
from dia_lightning.datamodules._split_warnings import named


@dataclass(frozen=True)
class Pictures:
    """The images of an annotation file.

    Args:
        paths: of their files, each once.
        inodes: a number per file that two names of the same file share.
        sizes: width and height ``[N, 2]``.
        image_ids: of every image; the first if a file has several entries.
        objects: of all images.
    """

    paths: list[str]
    inodes: list[int]
    sizes: npt.NDArray[np.int64]
    image_ids: list[int]
    objects: Objects


def find_pictures(file: CocoFile, folder: Path) -> Pictures:
    """Find the files of all images and merge entries for the same file.

    Args:
        file: an annotation file.
        folder: what its file names are relative to.

    Raises:
        FileNotFoundError: if files are missing; the message counts and names them.
        ValueError: if a name leads out of the folder, including by a symbolic link, or two entries for one file have
            different sizes.
    """
    finder, enclosure = FileFinder(), Enclosure(folder)
    paths, inodes, missing = [], [], []
    for name in file.file_names:
        path = _inside(file, folder, name)
        status = _status(path) or _status(path := _other_spelling(finder, file, folder, name) or path)
        paths.append(path)
        if status is None:
            missing.append(path)
        elif not enclosure.has(path):
            raise ValueError(
                f"{file.path} has file_name {name!r}, which a symbolic link leads out of {folder}. Give the folder "
                "that has the images, or put the file in its place."
            )
        else:
            inodes.append(inode(status))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images of {file.path} are not there: {named(missing)}."
        )
    return _merged(file, Pictures(paths, inodes, file.sizes, file.image_ids, file.objects))


def tell_of_unlisted(file: CocoFile, paths: Sequence[str]) -> None:
    """Warn of images next to those of an annotation file that have no entry in it."""
    listed, endings = set(paths), readable_endings()
    unlisted = []
    for folder in sorted({os.path.dirname(path) for path in paths}):
        with os.scandir(folder or os.curdir) as entries:
            images = [entry.name for entry in entries if ending(entry.name) in endings and not is_hidden(entry.name)]
        unlisted += [path for name in images if (path := os.path.join(folder, name)) not in listed]
    if unlisted:
        rank_zero_info(
            f"{len(unlisted)} images beside those of {file.path} are not in it and are left out: "
            f"{named(sorted(unlisted))}."
        )


def _inside(file: CocoFile, folder: Path, name: str) -> str:
    # As text: a Path for each of COCO's 118,000 images would take seconds.
    root = os.path.abspath(folder)
    if not os.path.normpath(os.path.join(root, name)).startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f"{file.path} has file_name {name!r}, which leads out of {folder}.")
    return os.path.normpath(os.path.join(folder, name))


def _status(path: str) -> os.stat_result | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the latter: a null character
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _other_spelling(finder: FileFinder, file: CocoFile, folder: Path, name: str) -> str | None:
    """Return the file that a name refers to if it was written on another system."""
    found = finder.find(_inside(file, folder, name))
    if found is None and "\\" in name:
        found = finder.find(_inside(file, folder, name.replace("\\", "/")))
    return found


def _merged(file: CocoFile, pictures: Pictures) -> Pictures:
    entries: defaultdict[str, list[int]] = defaultdict(list)
    for position, path in enumerate(pictures.paths):
        entries[path].append(position)
    first = [positions[0] for positions in entries.values()]
    sizes = np.array([_size(file, path, positions) for path, positions in entries.items()], dtype=np.int64)
    objects = pictures.objects
    if len(first) < len(pictures.paths):
        new = {position: number for number, positions in enumerate(entries.values()) for position in positions}
        image = np.array([new[position] for position in objects.image.tolist()], dtype=np.int64)
        several = {number for number, positions in enumerate(entries.values()) if len(positions) > 1}
        objects = _each_once(replace(objects, image=image), several)
        files = [path for path, positions in entries.items() if len(positions) > 1]
        rank_zero_warn(
            f"{file.path} has {len(pictures.paths)} entries for {len(first)} image files ({named(files)}): entries of "
            "one file are merged under the id of the first, and equal boxes are taken once."
        )
    return Pictures(
        paths=list(entries),
        inodes=[pictures.inodes[position] for position in first],
        sizes=sizes,
        image_ids=[pictures.image_ids[position] for position in first],
        objects=objects,
    )


def _size(file: CocoFile, path: str, positions: list[int]) -> tuple[int, int]:
    known = {(width, height) for width, height in file.sizes[positions].tolist() if width and height}
    if len(known) > 1:
        ids = ", ".join(str(file.image_ids[position]) for position in positions)
        raise ValueError(f"{file.path} has images {ids} for one file, {path}, with different sizes: {sorted(known)}.")
    return known.pop() if known else image_size(path)


def _each_once(objects: Objects, several: set[int]) -> Objects:
    """Drop duplicate objects of images that have several entries."""
    seen: set[tuple[float, ...]] = set()
    kept = []
    for row, (image, label, crowd) in enumerate(
        zip(objects.image.tolist(), objects.labels.tolist(), objects.iscrowd.tolist(), strict=True)
    ):
        key = (image, label, crowd, *objects.boxes[row].tolist())
        if image not in several or key not in seen:
            kept.append(row)
        seen.add(key)
    return objects.rows(np.array(kept, dtype=np.int64))
