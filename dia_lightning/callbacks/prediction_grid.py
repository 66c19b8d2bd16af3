"""A picture of what the classifier says about some images."""

import heapq
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dia_lightning.callbacks._class_names import check_has_one_class, class_names
from dia_lightning.callbacks._sample_grid import SampleGrid, evenly, when
from dia_lightning.callbacks._step_outputs import StepOutputs, read_step_outputs
from dia_lightning.callbacks.pictures import log_picture
from dia_lightning.drawing import Prediction, draw_predictions


class PredictionGrid(SampleGrid[Prediction]):
    """Draw images with their true class, the predicted class and its probability.

    In validation the images are spread evenly over the set and are the same each time, so that the pictures of a run
    can be compared. In test up to half of them are the most confident mistakes. The picture is named
    ``val/predictions`` or ``test/predictions``. In a distributed run it shows samples of rank zero.

    The task's steps must return ``{"index": [B], "probabilities": [B, K]}``, and batches begin with images and labels.
    Images are shown through the datamodule's ``denormalize`` where it has one, else each is stretched to [0, 1].

    Args:
        num_images: number of images in the picture, 1 to 100.
        every_n_epochs: draw after every n-th training epoch only.

    Raises:
        ValueError: if an argument is out of range, or a step returns something else.

    Example:
        >>> grid = PredictionGrid(num_images=9, every_n_epochs=10)
        >>> PredictionGrid(num_images=0)
        Traceback (most recent call last):
        ...
        ValueError: num_images must be from 1 to 100, got 0. 16 gives a readable picture.
    """

    _most_images = 100
    _readable_images = 16

    def __init__(self, *, num_images: int = 16, every_n_epochs: int = 1) -> None:
        super().__init__(num_images=num_images, every_n_epochs=every_n_epochs)
        self._mistakes: list[Prediction] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a true class to show."""
        instead = "Leave it out; PredictionWriter writes a CSV file."
        check_has_one_class(pl_module, type(self).__name__, instead)

    def _collect(self, trainer: Trainer, batch: Any, outputs: Any, missing: int) -> None:
        """Keep some images of the batch and, in test, its most confident mistakes."""
        if missing > 0 or trainer.testing:  # reading waits for the device
            predictions = read_step_outputs(outputs)
            self._spread += _select(trainer, batch, predictions, evenly(len(predictions.rows), missing))
            if trainer.testing:
                self._collect_mistakes(trainer, batch, predictions)

    def _forget(self) -> None:
        super()._forget()
        self._mistakes = []

    def _collect_mistakes(self, trainer: Trainer, batch: Any, predictions: StepOutputs) -> None:
        """Keep the most confident mistakes so far."""
        room = self.num_images // 2
        confidence, predicted = predictions.probabilities.max(dim=1)
        wrong = torch.nonzero(predicted != batch[1].cpu()[predictions.rows]).flatten()
        worst = wrong[confidence[wrong].argsort(descending=True)[:room]]
        candidates = self._mistakes + _select(trainer, batch, predictions, worst)
        self._mistakes = heapq.nlargest(room, candidates, key=lambda prediction: prediction.confidence)

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw on rank zero; every rank comes here, because the ranks agree on the folder."""
        figure = None
        others = self._others()
        if others or self._mistakes:
            names = class_names(trainer, pl_module, (others + self._mistakes)[0].num_classes)
            right = sum(prediction.is_right for prediction in others)
            title = f"{stage}: {when(trainer)}{right} of {len(others)} right"
            if self._mistakes:
                title += ", then the most confident mistakes"
            figure = draw_predictions(others + self._mistakes, names, title)
        log_picture(trainer, f"{stage}/predictions", figure)

    def _others(self) -> list[Prediction]:
        """Return the samples that are shown beside the mistakes, spread evenly."""
        known = {mistake.sample for mistake in self._mistakes}
        others = [prediction for prediction in self._spread if prediction.sample not in known]
        return [others[i] for i in evenly(len(others), self.num_images - len(self._mistakes)).tolist()]


def _select(trainer: Trainer, batch: Any, predictions: StepOutputs, chosen: Tensor) -> list[Prediction]:
    """Copy the chosen predictions of a batch to the CPU, with images in [0, 1]."""
    if len(chosen) == 0:
        return []
    rows = predictions.rows[chosen]
    images = batch[0][rows.to(batch[0].device)].detach().float().cpu()
    labels = batch[1].cpu()[rows]
    images = _showable(trainer, images)
    confidence, predicted = predictions.probabilities[chosen].max(dim=1)
    return [
        Prediction(
            image=images[i],
            true=int(labels[i]),
            predicted=int(predicted[i]),
            confidence=float(confidence[i]),
            sample=int(predictions.indices[chosen[i]]),
            num_classes=predictions.probabilities.shape[1],
        )
        for i in range(len(rows))
    ]


def _showable(trainer: Trainer, images: Tensor) -> Tensor:
    """Return images ``[N, C, H, W]`` with values in [0, 1]."""
    denormalize = getattr(getattr(trainer, "datamodule", None), "denormalize", None)
    if denormalize is None:
        low = images.amin((1, 2, 3), keepdim=True)
        images = (images - low) / (images.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-12)
    else:
        images = denormalize(images).cpu()
    return torch.nan_to_num(images).clamp(0.0, 1.0)
