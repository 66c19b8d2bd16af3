"""Read the annotations of PASCAL VOC: one XML file per image."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.datamodules._annotated_files import Objects
from dia_lightning.datamodules._enclosure import Enclosure
from dia_lightning.datamodules._formats import ending, readable_endings
from dia_lightning.datamodules._image_files import find_images
from dia_lightning.datamodules._images import image_size
from dia_lightning.datamodules._lines_and_xml import read_lines, read_xml
from dia_lightning.datamodules._spellings import FileFinder, loose, plain

_EDGES = ("xmin", "ymin", "xmax", "ymax")
# Pixels count from 1 and the last one is part of the object, so the first pixel, 1 to 1, is the box 0 to 1.
_OFFSET = np.array([-1.0, -1.0, 0.0, 0.0])


@dataclass(frozen=True)
class _Object:
    number: int
    label: int
    box: list[float]
    difficult: bool


def read_voc(folder: Path, names: Path, classes: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64], Objects]:
    """Read a split.

    Args:
        folder: has ``Annotations`` and ``JPEGImages``.
        names: file that lists the images of the split, one name without ending per line.
        classes: label i is ``classes[i - 1]``.

    Returns:
        The image files, their widths and heights ``[N, 2]``, and their objects; difficult ones have ``iscrowd`` 1.

    Raises:
        FileNotFoundError: if the list, an image or its annotation is missing.
        ValueError: if an annotation cannot be read, or has an unknown class; the message names the file.
    """
    if not names.is_file():
        raise FileNotFoundError(f"{names} is not a file: expected the names of the images of the split, one per line.")
    lines = read_lines(names)
    if not lines:
        raise ValueError(f"{names} is empty, expected the names of the images of the split, one per line.")
    images, annotations = _Folder(folder / "JPEGImages", names), _Folder(folder / "Annotations", names)
    paths = list(dict.fromkeys(images.image_of(line) for line in lines))
    if len(paths) < len(lines):
        rank_zero_warn(f"{names} has {len(lines)} names for {len(paths)} images, each of which counts once.")
    labels = {plain(name.strip()): label for label, name in enumerate(classes, start=1)}
    sizes, found, empty = [], [], 0
    for path in paths:
        file = annotations.file(f"{Path(path).stem}.xml", Path(path).stem)
        root = read_xml(file)
        sizes.append(_size(root) or image_size(path))
        entries = list(enumerate(root.findall("object"), start=1))
        empty += sum(len(entry) == 0 for _, entry in entries)
        found.append([_object(file, *entry, labels) for entry in entries if len(entry[1]) > 0])
    if empty:
        rank_zero_warn(f"{empty} <object> without content in the annotations of {names} are left out.")
    return paths, np.array(sizes, dtype=np.int64), _table(found)


class _Folder:
    """A folder that the names of a list refer to, perhaps in the spelling of another system."""

    def __init__(self, folder: Path, names: Path) -> None:
        self._folder = folder
        self._names = names
        self._finder = FileFinder()
        self._enclosure = Enclosure(folder)
        self._by_stem: dict[str, list[str]] | None = None

    def file(self, name: str, line: str) -> str:
        """Return the path of a file.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        path = self._folder / name
        found = str(path) if path.is_file() else self._finder.find(str(path))
        if found is None or not os.path.isfile(found):
            raise FileNotFoundError(f"{path} is not a file, but {self._names} has {line!r}.")
        return self._checked(found, line)

    def _checked(self, path: str, line: str) -> str:
        if not self._enclosure.has(path):
            raise ValueError(
                f"{self._names} has the name {line!r}, whose file {path} is a symbolic link out of {self._folder}. Put "
                "the file in its place; the folder itself may be a link."
            )
        return path

    def image_of(self, line: str) -> str:
        """Return the path of a line's image: its name, perhaps with an ending, or followed by -1, 0 or 1."""
        name = re.sub(r"\s+(-1|0|1)$", "", line)
        for stem in (line, name):
            if Path(stem).name != stem:
                raise ValueError(f"{self._names} has the name {stem!r}, which leads out of {self._folder}.")
            if found := self._image(stem):
                return self._checked(found, stem)
        return self.file(f"{name}.jpg", name)

    def _image(self, stem: str) -> str | None:
        usual = self._folder / f"{stem}.jpg"
        if usual.is_file():
            return str(usual)
        if ending(stem) in readable_endings():  # the line has it
            return self._finder.find(str(self._folder / stem))
        if self._by_stem is None:
            self._by_stem = {}
            for path in find_images(self._folder, deep=False).paths:
                self._by_stem.setdefault(loose(Path(path).stem), []).append(path)
        found = self._by_stem.get(loose(stem), [])
        if len(found) > 1:
            raise ValueError(f"{self._names} has {stem!r}, which may be {' or '.join(found)}. Write the ending, too.")
        return found[0] if found else None


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _object(file: str, number: int, entry: ElementTree.Element, labels: dict[str, int]) -> _Object:
    name = plain(entry.findtext("name", "").strip())
    if name not in labels:
        raise ValueError(
            f"{file} has an object of class {name!r}, which is not in the option classes ({list(labels)})."
        )
    texts = [entry.findtext(f"bndbox/{edge}") for edge in _EDGES]
    try:
        box = [float(text or "") for text in texts]
    except ValueError:
        edges = ", ".join(f"{edge} {text!r}" for edge, text in zip(_EDGES, texts, strict=True))
        raise ValueError(f"{file}: object {number} ({name}) has no box of four numbers: {edges}.") from None
    return _Object(number, labels[name], box, _difficult(file, number, entry.findtext("difficult", "")))


def _difficult(file: str, number: int, text: str) -> bool:
    answers = {
        **dict.fromkeys(("1", "1.0", "true", "yes"), True),
        **dict.fromkeys(("", "0", "0.0", "false", "no"), False),
    }
    answer = answers.get(text.strip().lower())
    if answer is None:
        raise ValueError(f"{file}: object {number} has difficult {text!r}, expected 0 or 1.")
    return answer


def _table(found: list[list[_Object]]) -> Objects:
    objects = [entry for entries in found for entry in entries]
    boxes = np.array([entry.box for entry in objects], dtype=np.float64).reshape(-1, 4)
    return Objects(
        image=np.repeat(np.arange(len(found)), [len(entries) for entries in found]),
        boxes=boxes + _OFFSET,
        labels=np.array([entry.label for entry in objects], dtype=np.int64),
        iscrowd=np.array([entry.difficult for entry in objects], dtype=np.int64),
        area=np.full(len(objects), np.nan),
        ids=np.array([entry.number for entry in objects], dtype=np.int64),
        id_name="object",
    )
