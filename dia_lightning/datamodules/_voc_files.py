"""Reading the annotations of PASCAL VOC: one XML file per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from dia_lightning._text import read_text
from dia_lightning.datamodules._images import image_size
from dia_lightning.datamodules._objects import Objects

_EDGES = ("xmin", "ymin", "xmax", "ymax")
# Pixels count from 1 and the last one belongs to the object, so the first pixel, 1 to 1, is the box 0 to 1.
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
        names: list of the images of the split, one name without ending per line.
        classes: label i is ``classes[i - 1]``.

    Returns:
        The files of the images, their widths and heights ``[N, 2]``, and the objects in them; those that are difficult
        have ``iscrowd`` 1.

    Raises:
        FileNotFoundError: if the list, an image or its annotation is missing.
        ValueError: if an annotation cannot be read, or has an unknown class; the message names the file.
    """
    if not names.is_file():
        raise FileNotFoundError(f"{names} is not a file: expected the names of the images of the split, one per line.")
    stems = [line.split()[0] for line in read_text(names).splitlines() if line.strip()]
    if not stems:
        raise ValueError(f"{names} is empty, expected the names of the images of the split, one per line.")
    paths = [_existing(folder / "JPEGImages", stem, ".jpg", names) for stem in stems]
    labels = {name: label for label, name in enumerate(classes, start=1)}
    sizes, found = [], []
    for stem, path in zip(stems, paths, strict=True):
        file = _existing(folder / "Annotations", stem, ".xml", names)
        root = _parse(file)
        sizes.append(_size(root) or image_size(path))
        found.append([_object(file, *entry, labels) for entry in enumerate(root.findall("object"), start=1)])
    return paths, np.array(sizes, dtype=np.int64), _table(found)


def _existing(folder: Path, stem: str, ending: str, names: Path) -> str:
    if Path(stem).name != stem:
        raise ValueError(f"{names} has the name {stem!r}, which leads out of {folder}.")
    path = folder / f"{stem}{ending}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, but {names} has {stem!r}.")
    return str(path)


def _parse(file: str) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: unknown encodings
        raise ValueError(f"{file} is not valid XML ({error}). Fetch or write it again.") from error


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _object(file: str, number: int, entry: ElementTree.Element, labels: dict[str, int]) -> _Object:
    name = entry.findtext("name", "").strip()
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
    return _Object(number, labels[name], box, entry.findtext("difficult", "0").strip() == "1")


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
