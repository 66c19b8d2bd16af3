"""How much the attention maps of different layers agree, as training goes on."""

import math
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dia_lightning.analysis import (
    MapRecorder,
    Protocol,
    draw_correlation,
    map_correlation,
    mean_correlation,
)
from dia_lightning.attention import attention_layers
from dia_lightning.callbacks.pictures import log_picture


class MapCorrelation(Callback):
    """Log the Pearson correlation between the attention maps of the layers of a stage, in validation and test.

    Logged: ``val/map_correlation`` (in the test ``test/...``), the mean over all pairs of different layers of a stage,
    the same per stage as ``val/map_correlation_stage0``, and the picture ``val/correlation_of_maps``. Stages of a
    single layer have none; a network without attention logs nothing and warns. Which protocol the paper's "up to 0.85"
    rests on is not known; see :func:`~dia_lightning.analysis.map_correlation`.

    The maps are those of the weights that are validated, with :class:`EMA` the averaged ones. Outputs do not change. In
    a distributed run all processes count together; images that only fill up batches, with the index -1, do not. Of a
    validation step the first forward that is of all images of the batch counts, and no other. A compiled network runs
    uncompiled in validation and test then.

    Args:
        protocol: ``"per-image"``, ``"pooled"`` or ``"centred"``.
        replicates: of the bootstrap, for the intervals in the picture; 0 for none.
        seed: of the bootstrap.

    Raises:
        ValueError: if a number is negative, or there are two of these callbacks.

    Source:
        This package's own reading of arXiv 2210.16101.

    Example:
        >>> callback = MapCorrelation(protocol="centred")
        >>> callback.state_key
        'MapCorrelation'
    """

    def __init__(self, *, protocol: Protocol = "per-image", replicates: int = 200, seed: int = 0) -> None:
        map_correlation([], protocol)  # refuses an unknown one
        for name, value in (("replicates", replicates), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}.")
        self.protocol = protocol
        self.replicates = replicates
        self.seed = seed
        self._has_attention = True
        self._recorder: MapRecorder | None = None
        self._watching = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback before training."""
        if stage == "predict":
            return
        try:
            attention_layers(pl_module, own=False)  # networks are not run for it
            self._has_attention = True
        except ValueError:  # the control arm of a comparison has the same callbacks
            self._has_attention = False
            rank_zero_warn("MapCorrelation logs nothing, because the network has no attention.")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(item, MapCorrelation) for item in callbacks) > 1:
            raise ValueError(
                "There are several MapCorrelation callbacks, and all would log under the same names. Leave one; "
                "dia-lightning analyze has all protocols."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, with a bootstrap of its own in every process."""
        self._recorder = None
        if self._has_attention and not trainer.sanity_checking:
            seed = self.seed + trainer.global_rank
            self._recorder = MapRecorder(pl_module, own=False, replicates=self.replicates, seed=seed)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the step; other callbacks run the network after it."""
        if self._recorder is not None:
            self._recorder.only_next(_counted(batch))
            self._watching.enter_context(self._recorder)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave the network alone."""
        self._watching.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the network alone when a step is interrupted."""
        self._watching.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers and the picture of all processes together."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        for recorded in recorder.stages:
            recorded.moments.combine(
                lambda own, how: trainer.strategy.reduce(own.to(pl_module.device), reduce_op=how).cpu()
            )
        stages = map_correlation(recorder.stages, self.protocol)
        name = "test" if trainer.testing else "val"
        values = {"map_correlation": mean_correlation(stages)}
        values |= {f"map_correlation_stage{stage.stage}": stage.mean for stage in stages}
        defined = {f"{name}/{key}": value for key, value in values.items() if not math.isnan(value)}
        pl_module.log_dict(defined, batch_size=1)
        figure = draw_correlation(stages, self.protocol) if trainer.is_global_zero else None
        log_picture(trainer, f"{name}/correlation_of_maps", figure)

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def _counted(batch: Any) -> Tensor | None:
    """Return which images of a batch ``(images, labels, index)`` are no padding ``[B]``; ``None`` for all."""
    index = batch[2] if isinstance(batch, (list, tuple)) and len(batch) == 3 else None
    return None if index is None else torch.as_tensor(index) >= 0
