"""How large the gradient at the output of each stage is, as training goes on."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dia_lightning.analysis import draw_stage_gradients
from dia_lightning.attention import attention_layers
from dia_lightning.callbacks.pictures import log_picture


class StageGradients(Callback):
    """Log the gradient of the training loss at the output of each stage, ``|dLoss / d output|``.

    Logged: ``train/gradient_stage0``, ... (mean over images, channels and positions) and
    ``train/gradient_median_stage0``, ...; at the end of fit the picture ``train/gradients_of_stages``, the distribution
    of the means over the steps. Compare a plain network with one without shortcuts (``no_shortcut`` of
    ``cifar_resnet``), plain and with attention, to see what attention does for gradients.

    The loss is that of the training step, usually a mean over the batch, before it is divided for gradient
    accumulation, of whose batches the first counts; the factor of a loss scaler (``precision="16-mixed"``) is taken
    out, and a step that it skips for an overflow has no values. Losses and gradients of the training do not change. In
    a distributed run the values are those of the first process's share of the batch. A compiled network runs uncompiled
    in the steps that are measured, so measure every 50th or so.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.
        blocks: paths of modules in the task whose outputs are measured, one per stage, for example
            ``["backbone.layer1", "backbone.layer2", "backbone.layer3"]``; by default the last block with attention of
            each stage.

    Raises:
        ValueError: if ``every_n_steps`` is below 1, a block is not there, ``blocks`` are missing for a plain network.

    Source:
        This package's own reading of the experiment of arXiv 1905.10671 in which shortcuts are taken out.

    Example:
        >>> callback = StageGradients(every_n_steps=5, blocks=["backbone.layer1", "backbone.layer3"])
        >>> callback.state_key
        'StageGradients'
    """

    def __init__(self, *, every_n_steps: int = 1, blocks: Sequence[str] | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.blocks = None if blocks is None else list(blocks)
        self._found: list[str] = []
        self._means: dict[str, list[float]] = {}
        self._sizes: dict[str, tuple[Tensor, Tensor]] = {}
        self._measured_step = -1
        self._hooks = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the blocks before training."""
        if stage != "fit":
            return
        self._measured_step = -1
        self._means = {}  # a resumed run gets its own back after this
        self._found = _last_blocks(pl_module) if self.blocks is None else self.blocks
        known = dict(pl_module.named_modules())
        for path in self._found:
            if path not in known:
                raise ValueError(f"blocks: the task has no module {path!r}. Name modules as task.named_modules() does.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the blocks in the first batch of a step that is due."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._measured_step and step % self.every_n_steps == 0:
            self._measured_step = step
            self._sizes = {}
            self._hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does without hooks
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            for path in self._found:
                hook = partial(self._watch, path=path, scaler=scaler, parts=trainer.accumulate_grad_batches)
                self._hooks.callback(pl_module.get_submodule(path).register_forward_hook(hook).remove)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what arrived."""
        self._hooks.close()
        if not self._sizes:
            return
        values: dict[str, float] = {}
        for number, path in enumerate(self._found):
            mean, median = (float(value) for value in self._sizes.get(path, (math.nan, math.nan)))
            if math.isfinite(mean):
                values |= {f"train/gradient_stage{number}": mean, f"train/gradient_median_stage{number}": median}
            self._means.setdefault(path, []).append(mean)
        self._sizes = {}
        for logger in trainer.loggers:  # not by self.log, which drops the steps between those of log_every_n_steps
            logger.log_metrics(values, step=self._measured_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the distribution over the steps."""
        figure = None
        if trainer.is_global_zero:
            stages = {f"stage {number} ({path})": self._means.get(path, []) for number, path in enumerate(self._found)}
            silent = [path for path in self._found if not any(map(math.isfinite, self._means.get(path, [])))]
            if silent and self._means:
                rank_zero_warn(f"No gradient reached {', '.join(silent)} in training: is all before and in it frozen?")
            figure = draw_stage_gradients(stages) if len(silent) < len(stages) else None
        log_picture(trainer, "train/gradients_of_stages", figure)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the network alone when a step is interrupted."""
        self._hooks.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the means so far, so that the picture of a resumed run has all steps."""
        return {"means": {path: list(values) for path, values in self._means.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read them back."""
        self._means = {path: list(values) for path, values in state_dict["means"].items()}

    def _watch(self, module: nn.Module, args: Any, output: Any, *, path: str, scaler: Any, parts: int) -> None:
        features = output[0] if isinstance(output, tuple) else output
        if not isinstance(features, Tensor):
            raise ValueError(
                f"blocks: the output of {path} is a {type(features).__name__} and no features. Name a block that "
                "returns a tensor."
            )
        if not features.requires_grad:  # evaluation within the step, or all of it frozen
            return

        def measure(gradient: Tensor) -> None:
            sizes = gradient.detach().abs().float() * parts
            if scaler is not None:
                sizes = sizes / scaler.get_scale()
            self._sizes[path] = sizes.mean(), sizes.median()

        features.register_hook(measure)  # type: ignore[no-untyped-call]


def _last_blocks(task: nn.Module) -> list[str]:
    """Return the last block with attention of each stage."""
    try:
        layers = attention_layers(task, own=False)
    except ValueError:
        raise ValueError(
            "blocks must be given for a network without attention, whose stages are not known: for example blocks: "
            "[backbone.layer1, backbone.layer2, backbone.layer3]."
        ) from None
    return list({layer.stage: layer.block for layer in layers}.values())
