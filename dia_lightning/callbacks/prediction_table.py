"""A table of images and what the classifier says about them, to be sorted and filtered."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.callbacks._class_names import class_names
from dia_lightning.callbacks._result_writer import sample_name
from dia_lightning.callbacks.prediction_grid import PredictionGrid
from dia_lightning.drawing import Prediction

COLUMNS = ["sample", "image", "true", "predicted", "confidence", "correct"]


class PredictionTable(PredictionGrid):
    """Send a table of test images to Weights & Biases: sample, image, true and predicted class, confidence, correct.

    Up to half of the rows are the most confident mistakes, the most confident first; the others are spread evenly over
    the set. The table is named ``test/prediction_table``. Without Weights & Biases there is a warning and no table;
    ``PredictionWriter`` writes the predictions of all samples to a CSV file in any case.

    What the task and the datamodule must have is the same as for ``PredictionGrid``. In a distributed run the rows are
    samples of rank zero.

    Args:
        num_images: number of rows, 1 to 10000.

    Raises:
        ValueError: if ``num_images`` is out of range, or a step returns something else.

    Example:
        >>> PredictionTable(num_images=200).num_images
        200
    """

    _most_images = 10_000
    _readable_images = 100

    def __init__(self, *, num_images: int = 100) -> None:
        super().__init__(num_images=num_images)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if no logger takes the table."""
        super().setup(trainer, pl_module, stage)
        if stage == "test" and not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            rank_zero_warn(
                "PredictionTable needs Weights & Biases and there is no such logger. Add -c logger/wandb.yaml, "
                "or use PredictionWriter, which writes a CSV file."
            )

    def _draws_now(self, trainer: Trainer) -> bool:
        return trainer.testing and any(isinstance(logger, WandbLogger) for logger in trainer.loggers)

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        predictions = self._mistakes + self._others()
        if not trainer.is_global_zero or not predictions:
            return
        names = class_names(trainer, pl_module, predictions[0].num_classes)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                rows = [_row(prediction, names, trainer) for prediction in predictions]
                logger.log_table(f"{stage}/prediction_table", columns=COLUMNS, data=rows)


def _row(prediction: Prediction, names: list[str], trainer: Trainer) -> list[object]:
    import wandb

    return [
        sample_name(trainer, prediction.sample),
        wandb.Image(prediction.image.permute(1, 2, 0).squeeze(-1).mul(255).byte().numpy()),
        names[prediction.true],
        names[prediction.predicted],
        prediction.confidence,
        prediction.is_right,
    ]
