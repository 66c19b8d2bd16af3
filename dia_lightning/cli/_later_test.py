"""What a test after training needs, looked for before the training."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from dia_lightning.cli._errors import UserError
from dia_lightning.datamodules import DIADataModule


class CheckLaterTest(Callback):
    """Refuse a fit with ``test_after_fit`` whose test could not even start."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look when data have been fetched, in every process, before anything is trained."""
        if stage != "fit":
            return
        advice = "Fix this, or leave test_after_fit out"
        if not is_overridden("test_step", pl_module):
            raise UserError(f"test_after_fit: {type(pl_module).__name__} has no test_step to run. {advice}.")
        data: DIADataModule = trainer.datamodule  # type: ignore[attr-defined]
        try:
            data.check_test_data()
        except (ValueError, OSError) as error:
            raise UserError(f"test_after_fit: {str(error).rstrip('.')}. {advice} and run test separately.") from error
