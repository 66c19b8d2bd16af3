"""Pictures of which classes the classifier takes for which."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric

from dia_lightning.callbacks._class_names import check_has_one_class, class_names
from dia_lightning.callbacks.pictures import log_picture
from dia_lightning.drawing import draw_class_accuracy, draw_confusion_matrix


class ConfusionMatrix(Callback):
    """Draw the confusion matrix and the accuracy per class at the end of ``test``.

    The counts come from the task's ``confusion``, a torchmetrics ``MulticlassConfusionMatrix`` that the task updates in
    its test step; rows are true classes, columns predicted ones. Colours show the share of the true class, on a
    square-root scale that keeps rare mistakes visible. Up to 20 classes the cells name the share and the count, up to
    100 classes every row and column has its name. The pictures are ``test/confusion_matrix`` and
    ``test/class_accuracy``; the latter shows the 30 worst classes when there are more.

    Raises:
        ValueError: if the task has no metric named ``confusion``.

    Example:
        >>> callback = ConfusionMatrix()
        >>> callback.state_key
        'ConfusionMatrix'
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the task counts confusions."""
        check_has_one_class(pl_module, "ConfusionMatrix", "Leave it out.")
        if not isinstance(getattr(pl_module, "confusion", None), Metric):
            raise ValueError(
                f"{type(pl_module).__name__} has no metric named 'confusion'. Set self.confusion to a torchmetrics "
                "MulticlassConfusionMatrix and update it in test_step, or leave the ConfusionMatrix callback out."
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the counts of this test."""
        confusion = cast(Metric, pl_module.confusion)
        counts = confusion.compute().cpu().numpy()  # on every rank, because it gathers from all of them
        matrix = accuracy = None
        if trainer.is_global_zero and counts.sum() > 0:
            names = class_names(trainer, pl_module, len(counts))
            matrix = draw_confusion_matrix(counts, names)
            accuracy = draw_class_accuracy(counts, names)
        log_picture(trainer, "test/confusion_matrix", matrix)
        log_picture(trainer, "test/class_accuracy", accuracy)
