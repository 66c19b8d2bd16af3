"""A picture of what a diffusion task generates, and of how it gets there."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from dia_lightning.callbacks._class_names import class_names
from dia_lightning.callbacks._sample_grid import SampleGrid, evenly, when
from dia_lightning.callbacks._sampling import Sampling, is_sharded
from dia_lightning.callbacks.pictures import log_picture
from dia_lightning.drawing import draw_table, shorten
from dia_lightning.tasks import Sampler

MOST_COLUMNS = 20  # one per class
NAME_LENGTH = 14  # characters


class GeneratedGrid(SampleGrid[Tensor]):
    """Draw images that the task generates, at the end of validation and test, from the same noise each time.

    A conditional task gets one column per class with its name above; of more than 20 classes, 20 that are spread
    evenly. The picture is named ``val/samples`` or ``test/samples``; ``test/denoising`` shows for the images of its
    first row what the network takes them for, step by step, from pure noise on, with the timestep above. With
    :class:`EMA` the images come from the averaged weights, wherever it stands among the callbacks. In a distributed run
    rank zero makes the images while the others wait; where each process has a part of the network only (FSDP) nothing
    is drawn.

    The task is a :class:`~dia_lightning.tasks.DiffusionTask`, or has its ``sample``, ``denoising`` and ``no_class``.
    Training continues with the same random numbers as without this callback.

    Args:
        num_images: number of images, 1 to 400; with classes as many as fill whole rows.
        every_n_epochs: draw after every n-th training epoch only, where that has a validation.
        steps: how often the network runs per image; for ``"ddim"`` and ``"ddpm"`` a divisor of the task's timesteps.
        guidance: weight of the class; 1 is none. A task without classes takes no other.
        sampler: ``"ddim"``, ``"ddpm"`` or ``"dpm++"``.
        seed: of the noise, 0 or more.
        trace: whether to draw ``test/denoising``.

    Raises:
        ValueError: if an argument is out of range or does not fit the task, or the task makes no images.

    Example:
        >>> grid = GeneratedGrid(num_images=16, every_n_epochs=10, guidance=1.5)
        >>> GeneratedGrid(num_images=0)
        Traceback (most recent call last):
        ...
        ValueError: num_images must be from 1 to 400, got 0. 40 gives a readable picture.
    """

    _most_images = 400
    _readable_images = 40

    def __init__(
        self,
        *,
        num_images: int = 40,
        every_n_epochs: int = 1,
        steps: int = 25,
        guidance: float = 1.0,
        sampler: Sampler = "ddim",
        seed: int = 0,
        trace: bool = True,
    ) -> None:
        super().__init__(num_images=num_images, every_n_epochs=every_n_epochs)
        self.sampling = Sampling(steps, guidance, sampler, seed)
        self.trace = trace
        self._traces: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could only fail after an epoch, and say where there will be no pictures."""
        self.sampling.check(pl_module, type(self).__name__)
        if is_sharded(trainer):
            rank_zero_warn(
                f"GeneratedGrid draws nothing with {type(trainer.strategy).__name__}: no process has the whole "
                "network. Make images from a checkpoint, with dia-lightning sample."
            )

    def _collect(self, trainer: Trainer, batch: Any, outputs: Any, missing: int) -> None:
        """Make the images after the first batch.

        By then every callback has had its turn at the start of the epoch and none at the end: averaged weights are in
        the model, whatever the order of the callbacks.
        """
        if self._spread or is_sharded(trainer):
            return
        task: Any = trainer.lightning_module
        columns = self._columns(task)
        shown = self._classes(task)
        rows = math.ceil(self.num_images / columns) if shown is None else self.num_images // columns
        count = min(self.num_images, rows * columns)
        self._spread = list(self.sampling.images(task, count, None if shown is None else shown * rows).nan_to_num())
        if self.trace and trainer.testing:
            self._traces = list(self.sampling.images(task, min(count, columns), shown, trace=True).nan_to_num())

    def _classes(self, task: Any) -> list[int] | None:
        """Return the classes that are drawn, one per column."""
        if task.no_class is None:
            return None
        return evenly(task.no_class, min(MOST_COLUMNS, self.num_images)).tolist()

    def _columns(self, task: Any) -> int:
        classes = self._classes(task)
        return round(math.sqrt(1.6 * self.num_images)) if classes is None else len(classes)  # wider than high

    def _forget(self) -> None:
        super()._forget()
        self._traces = []

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw on rank zero; every rank comes here, because the ranks agree on the folder."""
        samples = denoising = None
        if self._spread:
            task: Any = pl_module
            classes = self._classes(task)
            known = [] if classes is None else class_names(trainer, task, task.no_class)
            names = [shorten(known[label], NAME_LENGTH) for label in classes or []]
            columns = self._columns(task)
            rows = [self._spread[start : start + columns] for start in range(0, len(self._spread), columns)]
            samples = draw_table(
                rows, f"{stage}: {when(trainer)}{len(self._spread)} samples, {self.sampling}", headings=names
            )
            if self._traces:
                denoising = draw_trace(self._traces, self.sampling.denoising(task), names=names)
        log_picture(trainer, f"{stage}/samples", samples)
        if self.trace and trainer.testing:
            log_picture(trainer, f"{stage}/denoising", denoising)


def draw_trace(traces: Sequence[Tensor], denoising: Any, *, names: Sequence[str] = ()) -> Image.Image:
    """Draw what a network takes images for, step by step.

    Args:
        traces: of each image ``[K, C, H, W]`` in [0, 1] or of 8 bits.
        denoising: what made them, from ``DiffusionTask.denoising``.
        names: what stands left of the rows; none for no names.

    Returns:
        A picture as :func:`draw_table` makes it, with the timesteps above.
    """
    headings = [f"t = {denoising.timesteps[step]:g}" for step in denoising.traced_steps()]
    title = "what the network takes noise for at timestep t"
    return draw_table([list(trace) for trace in traces], title, headings=headings, names=names)
