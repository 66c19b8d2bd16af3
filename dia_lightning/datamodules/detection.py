"""Data modules of images with boxes around objects."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from dia_lightning._choices import check_choice
from dia_lightning.datamodules._annotated_files import AnnotatedFiles, Objects
from dia_lightning.datamodules._bad_boxes import OnBadBox, check_boxes
from dia_lightning.datamodules._detection_samples import DetectionSamples, lists, lists_and_index
from dia_lightning.datamodules._detection_transforms import DetectionAugment, build_detection_transform
from dia_lightning.datamodules._sampling import Positions, Role
from dia_lightning.datamodules.base import DIADataModule, Split
from dia_lightning.datamodules.sources import Source


class DetectionDataModule(DIADataModule):
    """Base of the data modules for detection; a subclass only defines where images and boxes come from.

    Batches are those of :class:`DIADataModule` with lists instead of stacked tensors: images float32 ``[3, H, W]`` in
    [0, 1], each of its own size and not normalised (torchvision's detectors do that), and one dict per image as label,
    with ``boxes`` float32 ``[N, 4]`` (x1, y1, x2, y2 in pixels), ``labels`` int64 ``[N]`` in 1..K (0 is the
    background), if masks are loaded ``masks`` uint8 ``[N, H, W]``, and for evaluation ``iscrowd`` int64 ``[N]`` and
    ``area`` float32 ``[N]`` in pixels. N is 0 for an image without objects. Objects with ``iscrowd`` 1 are not used in
    training, and are neither hits nor misses in evaluation.

    A subclass implements :attr:`class_names` and :meth:`load_split`, which returns a source with targets.

    Args:
        batch_size: training images per step and process.
        augment: augmentation for training, named as in torchvision's detection references. ``"none"``: unchanged
            images. ``"hflip"``: half of them mirrored. ``"flips"``: also upside down. ``"lsj"``: large scale jitter to
            1024 x 1024. ``"ssd"``: colours changed, zoomed out, cropped and mirrored.
        on_bad_box: what to do with boxes that are NaN, infinite, without width or height, or with less than a pixel
            inside the image. ``"drop"`` drops them with a warning that counts and names them; ``"raise"`` makes them an
            error. Both happen when the data are opened, not mid-epoch.
        **common: as :class:`DIADataModule` takes them.

    Raises:
        ValueError: if an option is of the wrong type or out of its range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 4,
        augment: DetectionAugment = "hflip",
        on_bad_box: OnBadBox = "drop",
        **common: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **common)
        check_choice("augment", augment, get_args(DetectionAugment))
        check_choice("on_bad_box", on_bad_box, get_args(OnBadBox))
        self.augment = augment
        self.on_bad_box = on_bad_box

    @property
    def category_ids(self) -> list[int] | None:
        """Return the id of every class in the user's files: label i is ``category_ids[i - 1]``.

        ``None`` means that the files are missing; a checkpoint knows the ids.
        """
        return list(range(1, self.num_classes + 1))

    def image_id(self, index: int) -> int:
        """Return the id of an image of the prediction set in the user's COCO file; index + 1 if there is none."""
        return cast(DetectionSamples, self._dataset("predict")).image_id(index)

    def make_samples(self, source: Source, positions: Positions, *, role: Role) -> DetectionSamples:
        """Return images and targets, augmented for training."""
        transform = build_detection_transform(self.augment if role == "train" else "none")
        return DetectionSamples(source, positions, transform=transform, role=role)

    def collate_function(self, role: Role) -> Callable[[list[Any]], Any]:
        """Collate into lists, because images differ in size."""
        return lists if role == "train" else lists_and_index

    def check_test_data(self) -> None:
        """Check them as in all data modules, and that there is an object to find."""
        super().check_test_data()
        samples = self._dataset("test")
        if samples.classes() == set():
            raise ValueError(
                f"The {len(samples)} test images of {type(self).__name__} in {self.root} have no object, so there is "
                "nothing to score detections by. Give annotations with objects, or do not test."
            )

    def _annotated_files(
        self,
        split: Split,
        objects: Objects,
        *,
        paths: Sequence[str],
        sizes: npt.NDArray[np.int64],
        where: Path,
        **more: Any,
    ) -> AnnotatedFiles:
        good = check_boxes(
            objects,
            sizes=sizes,
            paths=paths,
            class_names=self.class_names,
            where=str(where),
            on_bad_box=self.on_bad_box,
        )
        if split == "train" and good.iscrowd.all():
            raise ValueError(f"{where} has no object to train on.")
        return AnnotatedFiles(paths, sizes=sizes, objects=good, bit_depth=self.bit_depth, **more)

    def _refuse_val_split(self, beside: str) -> None:
        if self.val_split != 0:
            raise ValueError(f"val_split must be 0 beside {beside}, got {self.val_split}.")
