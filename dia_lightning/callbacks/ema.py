"""Exponential moving average of the weights."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dia_lightning.tasks.precision import input_dtype

_Named: TypeAlias = tuple[str, Tensor]


class EMA(WeightAveraging):
    r"""Keep an exponential moving average of the weights, and validate, test, predict and save with it.

    After every optimizer step the average moves by :math:`a \leftarrow d_n a + (1 - d_n) w`, where n counts the
    steps that went in before; the first one is copied. With ``warmup`` the decay is
    :math:`d_n = \min(d, (1 + n) / (10 + n))`, so that the random weights of the start are soon forgotten.

    Running statistics of batch norms are averaged with the same decay as the weights, because they have to describe
    the activations of the averaged network and not those of the latest weights; counters are copied.

    Training itself is not changed: the trained weights come back after every validation. When ``fit`` ends, the model
    holds the average. In checkpoints ``state_dict`` is the average, so that test and predict use it, and
    ``current_model_state`` the trained weights, so that a resumed run continues as if it had not stopped.

    Unlike Lightning's ``EMAWeightAveraging``, this callback leaves the trained weights alone until the first
    update, lets ``test`` and ``validate`` after ``fit`` use the checkpoint they are given, puts the trained weights
    back when an exception ends a validation, and keeps the average on the model's device.

    With ``precision="bf16-true"`` or ``"16-true"`` the average is kept in float32, in checkpoints too, since in half
    precision a decay near 1 would be lost to rounding; the model validates with it, and ends with it, as it is rounded.

    Args:
        decay: share d of the old average that is kept at each step, in [0, 1).
        warmup: whether to start with a smaller decay that grows to ``decay``.
        start_step: number of optimizer steps to skip at the beginning.
        device: where to keep the average, for example ``"cpu"`` to save accelerator memory; ``None`` is the
            model's device.

    Raises:
        ValueError: if ``decay`` is not in [0, 1) or ``start_step`` is negative.

    Source:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up is that of
        TensorFlow's ``ExponentialMovingAverage``.

    Example:
        >>> ema = EMA(decay=0.999)
        >>> [round(ema.decay_at(n), 3) for n in (1, 10, 100, 100_000)]
        [0.182, 0.55, 0.918, 0.999]
    """

    def __init__(
        self, *, decay: float = 0.999, warmup: bool = True, start_step: int = 0, device: str | None = None
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}. 0.999 suits most runs.")
        if start_step < 0:
            raise ValueError(
                f"start_step must be 0 or more optimizer steps, got {start_step}. Use 0 to average at once."
            )
        super().__init__(device=device, use_buffers=True)
        self.decay = decay
        self.warmup = warmup
        self.start_step = start_step
        self._swapped = False
        self._exact: dict[str, Tensor] = {}

    def decay_at(self, updates: int) -> float:
        """Return the decay that is used after ``updates`` updates."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    @property
    def updates(self) -> int:
        """How many optimizer steps the average holds."""
        return 0 if self._average_model is None else int(self._average_model.n_averaged)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Update after every optimizer step from ``start_step`` on."""
        return step_idx is not None and step_idx >= self.start_step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the model when ``fit`` begins."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._average_model is not None:
            # on the accelerator, the reading of the counter would wait for the running step
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
            self._latest_update_step = trainer.global_step  # may be left from a fit with another trainer
            self._swapped = False
            self._exact = {}
            self._keep_precise(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the average to the model's device: in ``setup`` the model is still on the CPU."""
        if self._device is None and self._average_model is not None:
            self._average_model.module.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average after an optimizer step."""
        if trainer.global_step > self._latest_update_step and self.should_update(step_idx=trainer.global_step - 1):
            self._move_average(pl_module)
            self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the average (``validate`` by itself takes the weights that it is given)."""
        if trainer.state.fn == TrainerFn.FITTING and self.updates > 0:
            self._swap_in(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue with the trained weights."""
        self._swap_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trained weights in the model when a validation is interrupted."""
        self._swap_back(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        if self.updates > 0:
            super().on_train_end(trainer, pl_module)
        else:
            rank_zero_warn(
                f"EMA never began: start_step={self.start_step}, but training took {trainer.global_step} optimizer "
                "steps. The model keeps the trained weights; use a smaller start_step."
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the model's weights, and the trained weights beside it."""
        trained = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is None:
            return
        if self._swapped:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
        if self._swapped or self.updates == 0:
            checkpoint["state_dict"] = {name: self._exact.get(name, value) for name, value in trained.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue with the average of a checkpoint; only ``fit`` does."""
        # test and validate after fit would otherwise get the trained weights instead of the average
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _keep_precise(self, trainer: Trainer) -> None:
        """Bring the average to float32, or to the precision that the model will have if that is more."""
        assert self._average_model is not None
        least = torch.promote_types(input_dtype(trainer), torch.float32)
        for tensor in chain(self._average_model.module.parameters(), self._average_model.module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, least))

    def _swap_in(self, pl_module: LightningModule) -> None:
        for (name, average), (_, weight) in self._pairs(pl_module):
            if average.dtype != weight.dtype:  # the exact average must not go through the model's precision
                self._exact[name] = average.data
                average.data = average.data.to(weight.dtype)
        self._swap_models(pl_module)
        self._swapped = True

    def _swap_back(self, pl_module: LightningModule) -> None:
        if not self._swapped:
            return
        self._swap_models(pl_module)
        for (name, average), _ in self._pairs(pl_module):
            average.data = self._exact.pop(name, average.data)
        self._swapped = False

    def _pairs(self, pl_module: LightningModule) -> Iterator[tuple[_Named, _Named]]:
        """Yield the tensors of the average and of the model, with their names."""
        assert self._average_model is not None
        average: nn.Module = self._average_model.module
        named = [chain(module.named_parameters(), module.named_buffers()) for module in (average, pl_module)]
        return zip(*named, strict=True)

    @torch.no_grad()
    def _move_average(self, pl_module: LightningModule) -> None:
        """Move the average by the weights, which may be of another precision and on another device."""
        assert self._average_model is not None
        updates = self.updates
        copied: list[tuple[Tensor, Tensor]] = []
        moved: list[tuple[Tensor, Tensor]] = []
        for (_, average), (_, weight) in self._pairs(pl_module):
            pair = (average.detach(), weight.detach().to(average.device, average.dtype))
            is_counter = not (average.is_floating_point() or average.is_complex())
            (copied if updates == 0 or is_counter else moved).append(pair)
        if copied:
            torch._foreach_copy_([average for average, _ in copied], [weight for _, weight in copied])
        if moved:
            move = get_ema_multi_avg_fn(self.decay_at(updates))  # type: ignore[no-untyped-call]
            move([average for average, _ in moved], [weight for _, weight in moved], updates)
        self._average_model.n_averaged += 1
