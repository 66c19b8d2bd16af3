"""Samples and batches of images with objects."""

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dia_lightning.datamodules._sampling import Positions, Role, Samples
from dia_lightning.datamodules.sources import Source


class DetectionSource(Source, Protocol):
    """A set of images with objects."""

    def target(self, position: int) -> dict[str, Tensor]:
        """Return the objects of one image.

        Returns:
            ``boxes`` float32 ``[N, 4]`` (x1, y1, x2, y2 in pixels), ``labels`` int64 ``[N]`` in 1..K, ``iscrowd`` int64
            ``[N]``, ``area`` float32 ``[N]`` in pixels, and perhaps ``masks`` uint8 ``[N, H, W]``.
        """

    def image_id(self, position: int) -> int:
        """Return the id of an image in the user's annotation file, position + 1 if there is none."""


class DetectionSamples(Samples):
    """Images float32 ``[3, H, W]`` in [0, 1] and targets, see :class:`DetectionDataModule`."""

    def __init__(self, source: Source, positions: Positions, *, transform: v2.Transform, role: Role) -> None:
        super().__init__(source, positions, role=role)
        self._transform = transform

    def load(self, position: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return the transformed image and its objects; without objects for prediction."""
        image = tv_tensors.Image(v2.functional.pil_to_tensor(self._source.image(position)))
        if self._role == "predict":
            return self._transform(image), None
        target = cast(DetectionSource, self._source).target(position)
        if self._role == "train":
            target = _select(target, target["iscrowd"] == 0)
            del target["iscrowd"], target["area"]
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
        if "masks" in target:
            target["masks"] = tv_tensors.Mask(target["masks"])
        image, target = self._transform(image, target)
        if self._role == "train" and "masks" in target:
            # A box can reach into the crop even if no pixel of the object does.
            target = _select(target, (target["masks"] > 0).flatten(1).any(1))
        return image, target

    def classes(self) -> set[int] | None:
        """Return which classes have objects in the samples; ``None`` if the source does not know."""
        if not hasattr(self._source, "classes_in"):
            return None
        return {label - 1 for label in self._source.classes_in(self._positions)}

    def image_id(self, index: int) -> int:
        """Return the id of a sample's image in the user's annotation file, index + 1 if there is none."""
        position = self.position(index)
        return self._source.image_id(position) if hasattr(self._source, "image_id") else index + 1


def lists(samples: list[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """Collate images of different sizes: lists instead of stacked tensors."""
    return tuple(list(column) for column in zip(*samples, strict=True))


def lists_and_index(samples: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Collate as :func:`lists` does, with the indices as a tensor ``[B]``."""
    *columns, index = lists(samples)
    return (*columns, torch.tensor(index))


def _select(target: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    return {name: values[keep] for name, values in target.items()}
