"""What all tasks have in common."""

import os
from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn
from typing_extensions import Unpack

from dia_lightning._checkpoint_file import read_checkpoint
from dia_lightning._checkpoint_kind import check_is_of_task
from dia_lightning._hyperparameters import primitive
from dia_lightning._redact import redact
from dia_lightning.tasks import _process_states
from dia_lightning.tasks._compilation import compile_in_place
from dia_lightning.tasks._finite import FiniteModule
from dia_lightning.tasks._from_checkpoint import build
from dia_lightning.tasks._resume_check import leave_out_finders
from dia_lightning.tasks._resume_point import ResumePoint
from dia_lightning.tasks._shareable import Shareable
from dia_lightning.tasks._stop import StopOnSignal
from dia_lightning.tasks._trainer import trainer_of
from dia_lightning.tasks.attention_options import AttentionOptions
from dia_lightning.tasks.optimization_options import OptimizationOptions
from dia_lightning.tasks.options import TakesOptions, TaskOptions

Task = TypeVar("Task", bound="DIATask")


class DIATask(TakesOptions, FiniteModule, Shareable):
    """Base class of the tasks: optimizer and schedule, hyperparameters that reload, class names in the checkpoint.

    Precision: losses, their sums and probabilities are float32 or better in every precision of the trainer. With the
    same weights, the losses of ``16-mixed``, ``bf16-mixed``, ``16-true`` and ``bf16-true`` are within 1 % of those of
    ``32-true``, and those of ``64-true`` within 1e-5; a score differs where two outputs were nearly equal. The mean of
    an epoch is exact to float32 after any number of batches. ``bf16-true`` and ``16-true`` also round the weights, what
    an optimizer step changes in them, and class probabilities of mixup, to 8 and 11 bits; detection refuses them.
    ``16-true`` has no loss scaling: it gives a warning, and optimizers whose ``eps`` is 0 in float16 are refused.

    Args:
        **options: those of :class:`AttentionOptions`, which :meth:`attach_attention` uses, and of
            :class:`OptimizationOptions`.

    Raises:
        ValueError: if a number is out of range or a name is unknown; at run time, if the precision is unsuitable.
    """

    def __init__(self, **options: Unpack[TaskOptions]) -> None:
        super().__init__(**options)
        self.remember(self._options.values_of(OptimizationOptions))
        self.lr = float(self._options.lr)
        self._has_attached = False
        self._data: dict[str, Any] = {}
        self._compiled: list[nn.Module] = []
        #: Optimizer steps behind the weights of a loaded checkpoint; ``None`` while training continues.
        self.trained_steps: int | None = None
        self._resume_point: ResumePoint | None = None
        self._seen = 0
        self._told: set[str] = set()

    # ---- construction

    def remember(self, arguments: Mapping[str, Any]) -> None:
        """Add a constructor's arguments to the hyperparameters, in a form that loads with ``weights_only=True``.

        Objects are replaced by a mark, and ``init_from`` is omitted: a checkpoint brings its own weights.

        Args:
            arguments: ``locals()`` at the start of the constructor.
        """
        left_out = {"self", "__class__", "init_from"}
        # those of the bases are saved already
        left_out |= {
            name
            for name in ("options", "optimization")
            if isinstance(arguments.get(name), dict) and arguments[name].keys() <= TaskOptions.__annotations__.keys()
        }
        kept = {name: value for name, value in arguments.items() if name not in left_out}
        # The dictionary itself is passed, because under LightningCLI the arguments would be read from the parser.
        self.save_hyperparameters({name: primitive(value) for name, value in kept.items()}, logger=False)

    def attach_attention(self, network: nn.Module, example: Any = None) -> None:
        """Attach the attention named by the options, if any, to a network of the task, in place.

        Args:
            network: the backbone.
            example: its example input, if :func:`~dia_lightning.attention.attach` does not know the network.

        Raises:
            ValueError: if it cannot be attached, or was before.
        """
        if self._has_attached:
            raise ValueError(
                "attach_attention was called before, and attaches once. Pass further networks to dia_lightning.attach."
            )
        self._has_attached = True
        self.remember(self._options.values_of(AttentionOptions))
        self._options.attach_to(network, example)
        # done; and a callable may not be picklable
        self._options = replace(self._options, attention=None, existing="keep")

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
        """Per-channel mean and deviation that images were normalised with, from the data module or the checkpoint."""
        return (self._data["mean"], self._data["std"]) if {"mean", "std"} <= set(self._data) else None

    def configure_callbacks(self) -> list[Callback]:
        """Save and stop on SIGTERM and Ctrl-C; Lightning adds the returned callbacks to the trainer's."""
        return [StopOnSignal()]

    # ---- data

    def setup(self, stage: str) -> None:
        """Take class names and normalisation from the data module, to keep them in the checkpoint."""
        if self._options.changes_network:
            raise ValueError(
                f"attention={self._options.attention!r} and existing={self._options.existing!r} have no effect, "
                f"because {type(self).__name__} never attaches any. Call self.attach_attention(network) in its "
                "constructor, or omit them."
            )
        super().setup(stage)
        compile_in_place(self._compiled)  # again in a spawned process, whose copy is not compiled
        datamodule = getattr(self.trainer, "datamodule", None)
        found = {name: getattr(datamodule, name, None) for name in ("class_names", "category_ids", "image_shape")}
        found["mean"], found["std"] = getattr(datamodule, "normalization", (None, None))
        for name, value in found.items():
            if value is not None:
                self._data[name] = list(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is needed to use the network without its data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["dia_task"] = type(self).__name__
        checkpoint["dia_data"] = self._data
        if "loops" in checkpoint and trainer_of(self) is not None:  # of a training that can be resumed
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
            trainer.precision_plugin.convert_module(self)  # Lightning does so later, and would round the weights
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
        cls: type[Task],  # noqa: N805  # Lightning uses its own decorator
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Task:
        """Load a task from a checkpoint, which is treated as data: no code is run from it and no class imported.

        Args:
            checkpoint_path: a path, or a file opened in binary mode.
            map_location: as ``torch.load`` takes it; without a GPU, the CPU by default.
            hparams_file: not read.
            strict: whether the weights must match the task's exactly.
            weights_only: always ``True``.
            **kwargs: of the task, overriding those in the checkpoint: objects must be given again.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else, code, or invalid options.
        """
        content, source = read_checkpoint(
            checkpoint_path, map_location, hparams_file=hparams_file, weights_only=weights_only
        )
        check_is_of_task(content, source)
        return build(cls, content, kwargs, source, strict=strict)

    def tell(self, topic: str, message: str | None) -> None:
        """Warn of a problem in the data, once per topic; ``None`` means there is none."""
        if message is not None and topic not in self._told:
            self._told.add(topic)
            rank_zero_warn(message)

    # ---- positions of images in their dataset

    def sample_index(self, images: Tensor | Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
        """Return the position ``[B]`` of each image; if the batch lacks it, count as Lightning distributes samples.

        Samples that Lightning repeats to give all processes equally many get -1.
        """
        if given:
            return given[0]
        position = self._seen + torch.arange(len(images), device=images[0].device)
        self._seen += len(images)
        position = position * self.trainer.world_size + self.trainer.global_rank
        return torch.where(position < self._count_samples(), position, -1)

    def _count_samples(self) -> float:
        """Return the number of samples in this stage's loader, infinity if unknown."""
        trainer = self.trainer
        loader = trainer.val_dataloaders  # also during fit
        if trainer.testing or trainer.predicting:
            loader = trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders
        data = getattr(loader, "dataset", None)
        has_samples = getattr(loader, "batch_size", None) is not None  # otherwise the dataset may hold whole batches
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
        """Resume from a checkpoint, and forget how long its weights were trained."""
        super().on_train_start()
        self.trained_steps = None
        if self._resume_point is not None:
            self._resume_point.enter(self.trainer, self)

    def on_train_epoch_end(self) -> None:
        """Forget that training resumed from a checkpoint."""
        super().on_train_epoch_end()
        if self._resume_point is not None:
            self._resume_point.end_epoch(self.trainer, self)
            self._resume_point = None

    # ---- losses

    def evaluation_loss(self, batch: Any) -> Tensor:
        """Return the loss of a validation or test batch, summed over its images: the same value at every call.

        The task must be in evaluation mode, and all modules of the network stay in it: no dropout, no update of running
        statistics. Nothing is logged and no metric is updated.

        Args:
            batch: as a data module of this package returns it in validation, on the device of the task.

        Raises:
            ValueError: if a custom task does not define it.
        """
        raise ValueError(
            f"{type(self).__name__} has no evaluation_loss, which an analysis needs. Define it: the loss of a batch, "
            "summed over its images."
        )


def brief(value: Sequence[Any]) -> str:
    """Return a list for a message: its first five items, and how many there are."""
    shown = ", ".join(str(item) for item in value[:5])
    return f"[{shown}, ... {len(value)} in all]" if len(value) > 5 else f"[{shown}]"
