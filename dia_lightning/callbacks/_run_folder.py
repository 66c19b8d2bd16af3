"""Where the files of one run belong."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run. Call it on every rank: the ranks agree on rank zero's answer.

    It is the log folder of the first logger (``.../version_3``), the folder that Lightning's ``ModelCheckpoint`` uses
    when that logger keeps no folder per run (``<save_dir>/<project>/<run id>`` for Weights & Biases), or the trainer's
    ``default_root_dir`` without a logger. With ``fast_dev_run``, which is to leave nothing, it is a temporary folder
    that goes when the process ends.

    Args:
        trainer: the trainer, in or after ``setup``.

    Returns:
        The folder, which may not exist yet.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dia_lightning.callbacks import run_folder
        >>> trainer = Trainer(logger=False, default_root_dir="runs", accelerator="cpu", enable_progress_bar=False)
        >>> run_folder(trainer).name
        'runs'
    """
    if getattr(trainer, "fast_dev_run", False):
        return Path(trainer.strategy.broadcast(_scratch().name))
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    first = trainer.logger
    if first is not None and not isinstance(first, (CSVLogger, TensorBoardLogger)) and first.name and first.version:
        # save_dir of such loggers is shared by all runs; a second run would overwrite the files of the first
        version = first.version if isinstance(first.version, str) else f"version_{first.version}"
        folder = folder / first.name / version
    return Path(trainer.strategy.broadcast(str(folder)))


@cache
def _scratch() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="dia-lightning-", ignore_cleanup_errors=True)
