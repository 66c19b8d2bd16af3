"""What all tasks have in common."""

import os
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn

from dia_lightning._checkpoint_file import read_checkpoint
from dia_lightning._checkpoint_kind import check_is_of_task
from dia_lightning._hyperparameters import primitive
from dia_lightning._redact import redact
from dia_lightning.tasks import _process_states
from dia_lightning.tasks._compilation import compile_in_place
from dia_lightning.tasks._finite import FiniteModule
from dia_lightning.tasks._freezing import Freeze
from dia_lightning.tasks._from_checkpoint import build
from dia_lightning.tasks._optimizers import Options
from dia_lightning.tasks._resume_check import leave_out_finders
from dia_lightning.tasks._resume_point import ResumePoint
from dia_lightning.tasks._shareable import Shareable
from dia_lightning.tasks._stop import StopOnSignal
from dia_lightning.tasks._trainer import trainer_of

Task = TypeVar("Task", bound="DIATask")


class DIATask(FiniteModule, Shareable):
    """Base class of the tasks: optimizer and schedule, hyperparameters that reload, class names in the checkpoint.

    Precision: losses, their sums and probabilities are float32 or better in every precision of the trainer. With the
    same weights, the losses of ``16-mixed``, ``bf16-mixed``, ``16-true`` and ``bf16-true`` are within 1 % of those of
    ``32-true``, and those of ``64-true`` within 1e-5; a score differs where two outputs were nearly equal. The mean of
    an epoch is exact to float32 after any number of batches. ``bf16-true`` and ``16-true`` also round the weights, what
    an optimizer step changes in them, and class probabilities of mixup, to 8 and 11 bits; detection refuses them.
    ``16-true`` has no loss scaling, so that it warns, and refuses optimizers whose ``eps`` is 0 in float16.

    Args:
        optimizer: ``"sgd"``, ``"adamw"``, or a callable ``parameters -> Optimizer``, which then ignores ``lr``,
            ``momentum``, ``nesterov`` and ``weight_decay``, but for a rate that a learning-rate finder has found.
        lr: full learning rate, positive, that schedule, warm-up and factors act on. A finder (``LearningRateFinder``,
            ``Tuner.lr_find``) writes here. A resumed run keeps that of its checkpoint.
        momentum: of SGD, in [0, 1).
        nesterov: whether SGD uses Nesterov momentum.
        weight_decay: applied to all parameters, those of the attention included.
        norm_weight_decay: whether norms and biases have weight decay too.
        attention_lr: factor of the rate of the attention, 0 or more; its parameters are a group of their own then.
        layer_decay: factor in (0, 1] of the rate from each layer to the one before; the head has the full rate. A layer
            is a block of the backbone, or what stands outside of blocks with the norms after it. The attention has
            the full rate, times ``attention_lr``.
        freeze: what is not trained: patterns of names of parameters or modules, such as ``["backbone.layer1"]``, or
            ``"all-but-attention-and-head"``. Batch norms whose weights are frozen keep their statistics too. Nothing
            unfreezes it again, and what is frozen by other means stays so.
        schedule: ``"step"``, ``"cosine"``, ``"constant"``, or a callable ``optimizer -> LRScheduler``; stepped per
            epoch. ``"cosine"`` ends with the training: if ``trainer.max_steps`` ends it, the cosine is stepped, and
            ``warmup_epochs`` rise, per optimizer step. It does not know of ``trainer.max_time``.
        schedule_interval: ``"epoch"``, or ``"step"``, an optimizer step, which milestones count then too.
        schedule_frequency: a callable's schedule is stepped once in so many intervals.
        schedule_monitor: metric that ``ReduceLROnPlateau`` watches, for example ``"val/loss"``.
        milestones: epochs at which ``"step"`` multiplies the rate by ``gamma``.
        gamma: factor in (0, 1].
        warmup_epochs: epochs of linear rise before the schedule; that of a callable goes on meanwhile.
        warmup_steps: optimizer steps of linear rise at the start, usual in detection and diffusion; the schedule goes
            on meanwhile.

    Raises:
        ValueError: if a number is out of its range or a name is unknown; when it runs, if the precision does not suit.
    """

    def __init__(
        self,
        *,
        optimizer: Literal["sgd", "adamw"] | OptimizerCallable = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        norm_weight_decay: bool = True,
        attention_lr: float = 1.0,
        layer_decay: float = 1.0,
        freeze: Freeze = None,
        schedule: Literal["step", "cosine", "constant"] | LRSchedulerCallable = "constant",
        schedule_interval: Literal["epoch", "step"] = "epoch",
        schedule_frequency: int = 1,
        schedule_monitor: str | None = None,
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        warmup_epochs: int = 0,
        warmup_steps: int = 0,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        self.remember(arguments)
        self._options = Options(**{name: arguments[name] for name in Options.__dataclass_fields__})
        self.lr = float(lr)
        self._data: dict[str, Any] = {}
        self._compiled: list[nn.Module] = []
        #: Optimizer steps behind the weights of a checkpoint that was loaded; ``None`` while it trains on.
        self.trained_steps: int | None = None
        self._resume_point: ResumePoint | None = None
        self._seen = 0
        self._told: set[str] = set()

    # ---- construction

    def remember(self, arguments: Mapping[str, Any]) -> None:
        """Add a constructor's arguments to the hyperparameters, in a form that loads with ``weights_only=True``.

        Objects are replaced by a mark, and ``init_from`` is left out: a checkpoint brings its own weights.

        Args:
            arguments: ``locals()`` at the start of the constructor.
        """
        left_out = ("self", "__class__", "init_from", "optimization")
        kept = {name: value for name, value in arguments.items() if name not in left_out}
        # The dictionary itself is given, because under LightningCLI the arguments would be read from the parser
        # instead.
        self.save_hyperparameters({name: primitive(value) for name, value in kept.items()}, logger=False)

    def compile_parts(self, parts: Sequence[nn.Module]) -> None:
        """Compile modules of the task, in place."""
        self._compiled = list(parts)
        compile_in_place(self._compiled)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, from the data module or the checkpoint."""
        return self._data.get("class_names")

    @property
    def image_shape(self) -> list[int] | None:
        """Shape (C, H, W) of the images, from the data module or the checkpoint."""
        return self._data.get("image_shape")

    @property
    def normalization(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation per channel that images were normalised by, from the data module or the checkpoint."""
        return (self._data["mean"], self._data["std"]) if {"mean", "std"} <= set(self._data) else None

    def configure_callbacks(self) -> list[Callback]:
        """Save and stop on SIGTERM and Ctrl-C; Lightning adds what this returns to the callbacks of the trainer."""
        return [StopOnSignal()]

    # ---- data

    def setup(self, stage: str) -> None:
        """Take class names and normalisation from the data module, to keep them in the checkpoint."""
        super().setup(stage)
        compile_in_place(self._compiled)  # again in a spawned process, whose copy is not compiled
        datamodule = getattr(self.trainer, "datamodule", None)
        found = {name: getattr(datamodule, name, None) for name in ("class_names", "category_ids", "image_shape")}
        found["mean"], found["std"] = getattr(datamodule, "normalization", (None, None))
        for name, value in found.items():
            if value is not None:
                self._data[name] = list(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to use the network without its data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["dia_task"] = type(self).__name__
        checkpoint["dia_data"] = self._data
        if "loops" in checkpoint and trainer_of(self) is not None:  # of a training that can go on
            _process_states.save(self.trainer, self, checkpoint)
        for part in (self.CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY):
            if part in checkpoint:
                checkpoint[part] = redact(checkpoint[part])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read it back, and compare it with the data at hand."""
        super().on_load_checkpoint(checkpoint)
        self.trained_steps = checkpoint.get("global_step")
        trainer = trainer_of(self)
        if trainer is not None and isinstance(trainer.precision_plugin, DoublePrecision):
            trainer.precision_plugin.convert_module(self)  # Lightning does it later, and would round the weights
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            leave_out_finders(trainer)
            state = _process_states.restore(trainer, self, checkpoint)
            self._resume_point = ResumePoint.of(checkpoint, state) if "loops" in checkpoint else None
        stored = checkpoint.get("dia_data", {})
        for name, value in stored.items():
            present = self._data.get(name, value)
            if present == value:
                continue
            message = f"The checkpoint was trained with {name} {brief(value)}, but the data has {brief(present)}"
            if name == "class_names":
                raise ValueError(f"{message}. Labels would be mixed up: use the data the checkpoint was trained on.")
            rank_zero_warn(f"{message}. Results will differ from those of training.")
        self._data = {**stored, **self._data}

    @_restricted_classmethod
    def load_from_checkpoint(
        cls: type[Task],  # noqa: N805  # Lightning has a decorator of its own
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Task:
        """Load a task from a checkpoint, which is data: no code is run from it and no class imported, in any case.

        Args:
            checkpoint_path: a path, or a file that is open for reading bytes.
            map_location: as ``torch.load`` takes it; without a GPU, the CPU by default.
            hparams_file: not read.
            strict: whether the weights must be those of the task, all of them.
            weights_only: always ``True``.
            **kwargs: of the task, in place of those in the checkpoint: objects have to be given again.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else, code, or options that do not fit.
        """
        content, source = read_checkpoint(
            checkpoint_path, map_location, hparams_file=hparams_file, weights_only=weights_only
        )
        check_is_of_task(content, source)
        return build(cls, content, kwargs, source, strict=strict)

    def tell(self, topic: str, message: str | None) -> None:
        """Warn of something in the data, once per topic; of ``None`` there is nothing to say."""
        if message is not None and topic not in self._told:
            self._told.add(topic)
            rank_zero_warn(message)

    # ---- positions of images in their data set

    def sample_index(self, images: Tensor | Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
        """Return the position ``[B]`` of each image; without it in the batch, count as Lightning deals out samples.

        Samples that Lightning repeats, so that all processes have equally many, get -1.
        """
        if given:
            return given[0]
        position = self._seen + torch.arange(len(images), device=images[0].device)
        self._seen += len(images)
        position = position * self.trainer.world_size + self.trainer.global_rank
        return torch.where(position < self._count_samples(), position, -1)

    def _count_samples(self) -> float:
        """Return how many samples the loader of this stage has, infinity where it does not tell."""
        trainer = self.trainer
        loader = trainer.val_dataloaders  # also during fit
        if trainer.testing or trainer.predicting:
            loader = trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders
        data = getattr(loader, "dataset", None)
        has_samples = getattr(loader, "batch_size", None) is not None  # else the data set may hold whole batches
        return len(data) if has_samples and isinstance(data, Sized) else float("inf")

    def on_validation_epoch_start(self) -> None:
        """Count images from the start."""
        self._seen = 0

    def on_test_epoch_start(self) -> None:
        """Count images from the start."""
        self._seen = 0

    def on_predict_epoch_start(self) -> None:
        """Count images from the start."""
        self._seen = 0

    def on_train_start(self) -> None:
        """Go on from a checkpoint, and forget how long its weights were trained."""
        super().on_train_start()
        self.trained_steps = None
        if self._resume_point is not None:
            self._resume_point.enter(self.trainer, self)

    def on_train_epoch_end(self) -> None:
        """Forget that a training went on from a checkpoint."""
        super().on_train_epoch_end()
        if self._resume_point is not None:
            self._resume_point.end_epoch(self.trainer, self)
            self._resume_point = None

    # ---- losses

    def evaluation_loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch of validation or test, summed over its images: the same number at every call.

        The task must be in evaluation mode, and all modules of the network stay in it: no dropout, no running
        statistics that move. Nothing is logged and no metric is updated.

        Args:
            batch: as a data module of this package gives it in validation, on the device of the task.

        Raises:
            ValueError: if a task of the user's own does not define it.
        """
        raise ValueError(
            f"{type(self).__name__} has no evaluation_loss, which an analysis needs. Define it: the loss of a batch, "
            "summed over its images."
        )


def brief(value: Sequence[Any]) -> str:
    """Return a list for a message: its first five items, and how many there are."""
    shown = ", ".join(str(item) for item in value[:5])
    return f"[{shown}, ... {len(value)} in all]" if len(value) > 5 else f"[{shown}]"
