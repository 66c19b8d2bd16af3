"""How well an exported file agrees with the detector, object by object."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

Detection: TypeAlias = dict[str, Tensor]

#: Objects of network and file count as the same if their labels are equal and they differ by no more than this.
PIXELS, SCORE = 0.1, 1e-3


@dataclass(frozen=True)
class ExportedDetector:
    """A file that a detector was written to.

    Args:
        path: the file.
        images: number of images compared.
        objects: number of objects the network finds in these images.
        matched: how many of them the file also finds, with the same label, corners within 0.1 pixels and a score
            within 0.001.
        extra: number of objects that only the file finds. Rounding can add or remove objects of almost equal scores or
            overlaps.
        differences: largest difference over the matched objects, by output: ``boxes`` in pixels, ``scores``, ...
        snippet: Python code that loads the file without this package's training code.
    """

    path: Path
    images: int
    objects: int
    matched: int
    extra: int
    differences: dict[str, float]
    snippet: str

    @property
    def agreement(self) -> str:
        """How well network and file agree, in words."""
        if self.objects + self.extra == 0:
            return (
                f"neither network nor file finds an object in {self.images} images, which says little. Compare on "
                "images with objects."
            )
        units = {"boxes": " pixels"}
        listed = ", ".join(
            f"{name} {value:.1e}{units.get(name, '')}" for name, value in self.differences.items() if name != "labels"
        )
        extra = f", and {self.extra} that the network does not find" if self.extra else ""
        return (
            f"the file finds {self.matched} of the network's {self.objects} objects in {self.images} images{extra}; "
            f"largest difference: {listed}"
        )


def compared(
    path: Path, names: Sequence[str], pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], snippet: str
) -> ExportedDetector:
    """Compare the objects of the detector and of the file.

    Args:
        path: the file.
        names: of the outputs, among them ``boxes``, ``labels`` and ``scores``.
        pairs: per image the outputs of the detector and those of the file.
        snippet: that loads the file.
    """
    differences = dict.fromkeys(names, 0.0)
    objects = matched = in_file = 0
    for expected, found in pairs:
        one, other = (dict(zip(names, [value.cpu() for value in values], strict=True)) for values in (expected, found))
        rows, columns = matches(one, other)
        objects, matched, in_file = objects + len(one["labels"]), matched + len(rows), in_file + len(other["labels"])
        for name in names if rows else ():
            difference = (one[name][rows].double() - other[name][columns].double()).abs().max().item()
            differences[name] = max(differences[name], difference)
    return ExportedDetector(path, len(pairs), objects, matched, in_file - matched, differences, snippet)


def matches(one: Detection, other: Detection) -> tuple[list[int], list[int]]:
    """Return the indices of the objects that two detections of an image have in common.

    Args:
        one: ``boxes [N, 4]``, ``labels [N]`` and ``scores [N]``.
        other: the same for M objects.
    """
    distance = torch.cdist(one["boxes"].detach().double(), other["boxes"].double(), p=torch.inf)  # [N, M]
    scores = (one["scores"][:, None] - other["scores"]).abs()
    is_same = (one["labels"][:, None] == other["labels"]) & (scores <= SCORE) & (distance <= PIXELS)
    distance[~is_same] = torch.inf
    rows, columns = [], []
    for row, near in enumerate(distance):
        column = int(near.argmin()) if len(near) else 0
        if len(near) and near[column].isfinite():
            rows.append(row)
            columns.append(column)
            distance[:, column] = torch.inf  # each belongs to one
    return rows, columns
