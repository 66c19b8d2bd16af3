"""The results of an analysis in Weights & Biases or TensorBoard."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure

from dia_lightning.analysis.findings import Analysis
from dia_lightning.analysis.report import report
from dia_lightning.analysis.tables import scalars, tables
from dia_lightning.callbacks.pictures import send_picture
from dia_lightning.cli._errors import UserError
from dia_lightning.loggers import WandbLogger


def check_installed(kinds: Sequence[str]) -> None:
    """Refuse loggers whose packages are missing.

    Raises:
        ImportError: with what to install.
    """
    for kind in kinds:
        if find_spec(kind) is None:
            raise ImportError(
                f"--log {kind} needs the package {kind}, which is not installed. Install it (pip install {kind}), or "
                "leave --log out: the files are written in any case."
            )


def send(analysis: Analysis, pictures: Mapping[str, Figure], folder: Path, kinds: Sequence[str], origin: str) -> None:
    """Send figures, tables and main metrics to new runs; TensorBoard's is in the folder of the analysis.

    Args:
        analysis: the results.
        pictures: of them, by name.
        folder: of the analysis, whose files are there.
        kinds: ``"wandb"``, ``"tensorboard"`` or both.
        origin: where the network is from.

    Raises:
        UserError: if TensorBoard's file cannot be written. Weights & Biases falls back to offline mode.
    """
    for kind in dict.fromkeys(kinds):
        try:
            logger = _wandb(analysis, folder, origin) if kind == "wandb" else _tensorboard(analysis, folder, origin)
        except OSError as error:
            raise UserError(
                f"--log {kind} did not begin ({error}). The files of the analysis are in {folder}."
            ) from error
        for name, figure in pictures.items():
            send_picture(logger, f"analysis/{name}", figure, 0)
        logger.log_metrics({f"analysis/{name}": value for name, value in scalars(analysis).items()}, step=0)
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.finish()


def _wandb(analysis: Analysis, folder: Path, origin: str) -> Logger:
    logger = WandbLogger(job_type="analysis", save_dir=folder)
    logger.log_hyperparams({"analysis": {"origin": origin, **analysis.subject}})
    for table in tables(analysis):
        logger.log_table(f"analysis/{table.name}", columns=table.columns, data=table.rows, step=0)
    return logger


def _tensorboard(analysis: Analysis, folder: Path, origin: str) -> Logger:
    logger = TensorBoardLogger(folder, name="tensorboard", version="")
    logger.experiment.add_text("analysis/report", report(analysis, origin, []), 0)
    return logger
