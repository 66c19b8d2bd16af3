"""The objects of one image, true or detected, and the names of their classes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objects:
    """Objects of one image on the CPU.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels, ``[N, 4]``.
        labels: 1 to K, ``[N]``.
        scores: in [0, 1], ``[N]``; ``None`` for true objects.
        masks: the pixels of each object, bool ``[N, H, W]``; ``None`` where there are boxes only.
        crowd: whether a box holds a crowd, which no detector has to find, bool ``[N]``; ``None`` where nobody knows.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Tensor | None = None
    crowd: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.labels)

    def only(self, chosen: Tensor) -> "Objects":
        """Return the objects at positions, or where a bool ``[N]`` is true."""
        optional = {"scores": self.scores, "masks": self.masks, "crowd": self.crowd}
        return Objects(
            self.boxes[chosen],
            self.labels[chosen],
            **{name: None if part is None else part[chosen] for name, part in optional.items()},
        )

    def above(self, score: float) -> "Objects":
        """Return the objects with that score or a higher one."""
        return self if self.scores is None else self.only(self.scores >= score)

    def finite(self) -> "Objects":
        """Return the objects whose box can be drawn."""
        return self.only(torch.isfinite(self.boxes).all(dim=1))


class ObjectClasses(NamedTuple):
    """Classes of a detector, whose labels start at 1; ``None`` if unknown."""

    names: list[str] | None
    category_ids: list[int] | None

    def name(self, label: int) -> str:
        """Return the name of a label, else its number."""
        return str(label) if self.names is None else self.names[self._position(label, len(self.names))]

    def category_id(self, label: int) -> int:
        """Return the id of a label in the user's files, else the label."""
        if self.category_ids is None:
            return label
        return self.category_ids[self._position(label, len(self.category_ids))]

    @property
    def category_names(self) -> dict[int, str]:
        """Return the names of all known categories by id."""
        count = len(self.names or self.category_ids or [])
        return {self.category_id(label): self.name(label) for label in range(1, count + 1)}

    def _position(self, label: int, count: int) -> int:
        if not 1 <= label <= count:
            raise ValueError(
                f"Label {label} is none of the {count} classes, whose labels are 1 to {count}. "
                "Set num_classes of the model to the number of classes of the data."
            )
        return label - 1
