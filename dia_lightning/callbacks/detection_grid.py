"""A picture of what the detector finds in some images."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image

from dia_lightning.callbacks._class_names import object_classes
from dia_lightning.callbacks._sample_grid import SampleGrid, evenly, when
from dia_lightning.callbacks._step_outputs import detected_objects, read_detections, true_objects
from dia_lightning.callbacks.pictures import log_boxes, log_picture
from dia_lightning.drawing import ObjectClasses, Objects, Scene, draw_detections


class DetectionGrid(SampleGrid[Scene]):
    """Draw images twice, side by side: with their true objects, and with what the detector finds.

    The images are spread evenly over the validation or test set and are the same each time, so that the pictures of a
    run can be compared. Each class has one colour, the same in all pictures; masks are drawn too where there are any.
    The picture is named ``val/detections`` or ``test/detections``. Weights & Biases also gets the images with their
    boxes as data, named ``val/boxes`` or ``test/boxes``. In a distributed run they show samples of rank zero.

    The task's steps must return ``{"index": [B], "detections": list of B dicts}`` as torchvision's detectors give them,
    and batches begin with a list of images ``[3, H, W]`` in [0, 1] and a list of targets.

    Args:
        num_images: number of images in the picture, 1 to 24.
        score_threshold: draw detections from this score on, 0 to 1.
        every_n_epochs: draw after every n-th training epoch only.

    Raises:
        ValueError: if an argument is out of range, or a step returns something else.

    Example:
        >>> grid = DetectionGrid(num_images=4, score_threshold=0.3)
        >>> DetectionGrid(score_threshold=50)
        Traceback (most recent call last):
        ...
        ValueError: score_threshold must be from 0 to 1, got 50. 0.5 shows what the detector is sure of.
    """

    _most_images = 24
    _readable_images = 6

    def __init__(self, *, num_images: int = 6, score_threshold: float = 0.5, every_n_epochs: int = 1) -> None:
        super().__init__(num_images=num_images, every_n_epochs=every_n_epochs)
        if not 0 <= score_threshold <= 1:
            raise ValueError(
                f"score_threshold must be from 0 to 1, got {score_threshold}. 0.5 shows what the detector is sure of."
            )
        self.score_threshold = score_threshold

    def _collect(self, trainer: Trainer, batch: Any, outputs: Any, missing: int) -> None:
        """Copy some images of the batch to the CPU, with their true objects and the detections."""
        if missing == 0:
            return
        found = read_detections(outputs)
        for i in evenly(len(found.rows), missing).tolist():
            row = found.rows[i]
            scene = Scene(
                image=batch[0][row].detach().float().cpu(),
                true=true_objects(batch[1][row]),
                found=detected_objects(found.detections[i], self.score_threshold),
                sample=found.indices[i],
            )
            self._spread.append(scene)

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw on rank zero; every rank comes here, because the ranks agree on the folder."""
        picture = None
        classes = object_classes(trainer, pl_module)
        if self._spread:
            title = f"{stage}: {when(trainer)}detections above {self.score_threshold:g}"
            picture = draw_detections(self._spread, classes, title=title, score_threshold=self.score_threshold)
        log_picture(trainer, f"{stage}/detections", picture)
        if self._spread:
            boxes = [_boxes_of(scene, classes) for scene in self._spread]
            log_boxes(trainer, f"{stage}/boxes", _images_of_one_size(self._spread), boxes)


def _images_of_one_size(scenes: list[Scene]) -> list[Image.Image]:
    """Return the images, grey on the right and below where others are larger, so that boxes keep their places."""
    height, width = (max(scene.image.shape[side] for scene in scenes) for side in (1, 2))
    images = []
    for scene in scenes:
        padding = (0, width - scene.image.shape[2], 0, height - scene.image.shape[1])
        images.append(to_pil_image(F.pad(scene.image.nan_to_num().clamp(0, 1), padding, value=0.5)))
    return images


def _boxes_of(scene: Scene, classes: ObjectClasses) -> dict[str, Any]:
    """Return the boxes of a scene in the form that ``wandb.Image`` takes."""
    labels = scene.labels.union(range(1, len(classes.names or ()) + 1))
    names = {label: classes.name(label) for label in sorted(labels)}
    return {
        key: {"box_data": [_box(objects, i, names) for i in range(len(objects))], "class_labels": names}
        for key, objects in (("predictions", scene.found.finite()), ("ground_truth", scene.true.finite()))
    }


def _box(objects: Objects, i: int, names: dict[int, str]) -> dict[str, Any]:
    label = int(objects.labels[i])
    box = {
        "position": dict(zip(("minX", "minY", "maxX", "maxY"), objects.boxes[i].tolist(), strict=True)),
        "domain": "pixel",
        "class_id": label,
        "box_caption": names[label],
    }
    if objects.scores is not None:
        score = float(objects.scores[i])
        box |= {"box_caption": f"{names[label]} {score:.2f}", "scores": {"score": score}}
    return box
