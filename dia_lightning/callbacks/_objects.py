"""The objects of one image, true or detected, as the callbacks draw and write them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MASK_THRESHOLD = 0.5  # probability from which a pixel belongs to an object


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


def true_objects(target: Mapping[str, Tensor]) -> Objects:
    """Return the objects of a target."""
    masks, crowd = target.get("masks"), target.get("iscrowd")
    return Objects(
        boxes=target["boxes"].detach().float().cpu(),
        labels=target["labels"].detach().cpu(),
        masks=None if masks is None else masks.detach().bool().cpu(),
        crowd=None if crowd is None else crowd.detach().bool().cpu(),
    )


def detected_objects(detections: Mapping[str, Tensor], score_threshold: float) -> Objects:
    """Return the detections of an image from a score on; their masks are the pixels of probability 0.5 and more."""
    chosen = detections["scores"] >= score_threshold
    masks = detections.get("masks")
    return Objects(
        boxes=detections["boxes"][chosen].detach().float().cpu(),
        labels=detections["labels"][chosen].detach().cpu(),
        scores=detections["scores"][chosen].detach().float().cpu(),
        masks=None if masks is None else (masks[:, 0] >= MASK_THRESHOLD)[chosen].cpu(),
    )
