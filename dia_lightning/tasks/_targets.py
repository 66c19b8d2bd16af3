"""Checks of a detector's targets before torchvision trains on them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Target: TypeAlias = Mapping[str, Any]


def check_targets(targets: Sequence[Target], *, images: int, num_classes: int, masks: bool) -> None:
    """Refuse targets that would crash the process, or train on nonsense without an error.

    Args:
        targets: of a batch.
        images: number of images in that batch.
        num_classes: number of classes without the background, K.
        masks: whether masks are needed.

    Raises:
        ValueError: if a key is missing, counts differ, a label is not in 1..K, or a box is not finite or is empty.
    """
    if len(targets) != images:
        raise ValueError(f"The batch has {images} images and {len(targets)} targets, but each image needs one target.")
    needed = ["boxes", "labels", *(["masks"] if masks else [])]
    for position, target in enumerate(targets):
        missing = [name for name in needed if name not in target]
        if missing:
            hint = " Set masks=True in the data module." if missing == ["masks"] else ""
            raise ValueError(f"The target of {_image(position, target)} has no {', '.join(missing)}.{hint}")
        for name in needed[1:]:
            if len(target[name]) != len(target["boxes"]):
                raise ValueError(
                    f"The target of {_image(position, target)} has {len(target['boxes'])} boxes and "
                    f"{len(target[name])} {name}, but each box needs one."
                )
        if target["labels"].is_floating_point():
            raise ValueError(f"The labels of {_image(position, target)} are floats, but must be int64: call .long().")
    boxes = torch.cat([target["boxes"].reshape(-1, 4) for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    good_boxes = torch.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    good_labels = (labels >= 1) & (labels <= num_classes)
    if bool((good_boxes & good_labels).all()):  # waits for the device once
        return
    if not good_labels.all():
        raise ValueError(
            f"Label {int(labels[~good_labels][0])} in {_place(targets, good_labels)}: labels must be 1 to "
            f"{num_classes} (num_classes), because 0 is the background."
        )
    raise ValueError(
        f"Box {boxes[~good_boxes][0].tolist()} in {_place(targets, good_boxes)}: boxes must be finite (x1, y1, x2, y2) "
        "with x1 < x2 and y1 < y2: torchvision.ops.box_convert makes them of others. Data modules of this "
        "package drop bad ones with on_bad_box='drop'."
    )


def _place(targets: Sequence[Target], good: Tensor) -> str:
    """Return the image of the first bad box."""
    number = int(torch.nonzero(~good)[0])
    for position, target in enumerate(targets):
        if number < len(target["boxes"]):
            return _image(position, target)
        number -= len(target["boxes"])
    raise AssertionError("the box is in none of the images")


def _image(position: int, target: Target) -> str:
    name = target.get("image_id")
    return f"image {position} of the batch" + ("" if name is None else f" (image_id {int(name)})")
