"""The one way every picture of the package reaches the loggers and the disk."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from PIL import Image

from dia_lightning._whole_files import written_whole
from dia_lightning.callbacks._run_folder import run_folder
from dia_lightning.drawing import as_image


def log_picture(trainer: Trainer, name: str, picture: Image.Image | Figure | None) -> Path | None:
    """Write a picture to the run folder and send it to every logger that takes pictures.

    The file is ``<run folder>/pictures/<name>/step=<step>.png``, whatever loggers there are; the step is that of the
    weights, in a test of a checkpoint the checkpoint's. Loggers with a ``log_image`` method (Weights & Biases) and
    loggers whose experiment has ``add_image`` (TensorBoard) get it too. A full disk or a lost logger gives a warning,
    the latter once, because no picture is worth a training run.

    Call it on every rank, because the ranks agree on the run folder; only rank zero's picture is used.

    Args:
        trainer: the running trainer.
        name: tag of the picture, words divided by ``/``, for example ``val/predictions``.
        picture: an image, or a figure that was made without pyplot; ``None`` (on rank zero) writes nothing.

    Returns:
        The path of the file on rank zero; ``None`` on other ranks and when nothing was written.

    Raises:
        ValueError: if ``name`` is not made of letters, digits, ``_``, ``-`` and single ``/``.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(logger=False, default_root_dir=folder, accelerator="cpu", enable_progress_bar=False)
        ...     path = log_picture(trainer, "val/black", Image.new("RGB", (8, 8)))
        ...     str(path.relative_to(folder))
        'pictures/val/black/step=000000.png'
    """
    if re.fullmatch(r"[\w-]+(/[\w-]+)*", name) is None:
        raise ValueError(f"name {name!r} names no picture. Use words divided by '/', for example 'val/predictions'.")
    folder = run_folder(trainer)
    if not trainer.is_global_zero or picture is None:
        return None
    image = as_image(picture)
    step = _step_of_the_weights(trainer)
    path = folder / "pictures" / name / f"step={step:06d}.png"
    written = write_picture(image, path, name)
    for logger in trainer.loggers:
        send_picture(logger, name, image, step)
    return path if written else None


def send_picture(logger: Logger, name: str, picture: Image.Image | Figure, step: int) -> None:
    """Send a picture to one logger, if it takes pictures; a lost logger gives a warning, once.

    Args:
        logger: any; the service or file must be ready or be made at first use.
        name: tag of the picture.
        picture: an image, or a figure that was made without pyplot.
        step: of the weights.
    """
    _try(logger, name, partial(_send, logger, name, as_image(picture), step))


def write_picture(image: Image.Image, path: Path, name: str) -> bool:
    """Write a picture as PNG, whole or not at all, and tell whether it is there; a full disk gives a warning."""
    try:
        _write_png(image, path)
    except OSError as error:
        rank_zero_warn(f"Picture {name} was not written: {error}.")
        return False
    return True


def log_boxes(trainer: Trainer, name: str, images: list[Image.Image], boxes: Sequence[dict[str, Any]]) -> None:
    """Send images with their boxes as data to Weights & Biases, where a reader switches classes and scores on and off.

    Other loggers have no such thing and get nothing. Only rank zero's images are used.

    Args:
        trainer: the running trainer.
        name: tag of the images, for example ``val/boxes``.
        images: images of one size, because the viewer shows all in the shape of the first.
        boxes: what ``wandb.Image`` takes as ``boxes``, per image.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            send = partial(logger.log_image, key=name, images=images, step=_step_of_the_weights(trainer), boxes=boxes)
            _try(logger, name, send)


def _step_of_the_weights(trainer: Trainer) -> int:
    trained: int | None = getattr(trainer.lightning_module, "trained_steps", None)
    return trainer.global_step if trained is None else trained


_lost: WeakSet[Logger] = WeakSet()  # loggers that a warning was about


def _try(logger: Logger, name: str, send: Callable[[], None]) -> None:
    try:
        send()
    except Exception as error:  # loggers raise classes of their own, such as CommError of Weights & Biases
        _warn_once(logger, name, error)


def _warn_once(logger: Logger, name: str, error: Exception) -> None:
    if logger not in _lost:
        _lost.add(logger)
        rank_zero_warn(
            f"Picture {name} did not reach {type(logger).__name__}: {type(error).__name__}: {error}. "
            "Pictures are also files in the run folder; later ones that do not reach this logger are not warned about."
        )


def _write_png(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        image.save(part, format="PNG")


def _send(logger: Logger, name: str, image: Image.Image, step: int) -> None:
    if hasattr(logger, "log_image"):
        # Lightning turns this step into the key "trainer/global_step"; W&B's own step would drop late pictures
        logger.log_image(key=name, images=[image], step=step)
    elif hasattr(logger, "experiment") and hasattr(logger.experiment, "add_image"):
        logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
