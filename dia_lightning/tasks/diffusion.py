"""Image generation by diffusion."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from typing_extensions import Unpack

from dia_lightning._choices import check_choice
from dia_lightning._evaluating import evaluating
from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.models.denoisers import check_image_shape, get_denoiser, predict
from dia_lightning.models.denoising import Denoising, check_least, class_labels, seeded_generator
from dia_lightning.tasks._batch_checks import check_dtype, class_numbers, not_symmetric, pixel_range
from dia_lightning.tasks._compilation import Compile, parts_to_compile
from dia_lightning.tasks._mean import Mean
from dia_lightning.tasks._network import Backbone, images_like
from dia_lightning.tasks._noise_schedule import BetaSchedule, LossWeighting, NoiseSchedule, Prediction, Sampler
from dia_lightning.tasks._weights import load_weights
from dia_lightning.tasks.base import DIATask
from dia_lightning.tasks.options import TaskOptions

#: Seed of the validation and test noise, which never changes.
_EVALUATION_SEED = 0


class DiffusionTask(DIATask):
    """Trains a network to remove noise from images, with or without attention, and generates images with it.

    Logged: ``train/loss``, and ``val/loss`` and ``test/loss`` with noise and timesteps that depend only on the position
    of the image, so that epochs and runs can be compared.

    Batches are those of :class:`~dia_lightning.datamodules.ClassificationDataModule` with
    ``pixel_range="symmetric"``: ``(images [B, C, H, W] in [-1, 1], labels [B])``, in validation and test with the
    position of each image in its dataset as a third item, where -1 marks an image that only pads the batch of a
    distributed run and is not counted.

    The noise of a training step depends only on the seed of the run, the process, the epoch and the batch, so a resumed
    run continues with the noise of an uninterrupted one.

    Args:
        backbone: name of a network, see :func:`~dia_lightning.models.denoisers.get_denoiser`, or a network called like
            those of diffusers; a conditional one takes labels 0..K, where K stands for no class.
        num_classes: number of classes K; needed if ``conditional``.
        image_shape: (C, H, W). Data modules of this package provide it.
        backbone_args: further arguments of a named network, for example ``{"block_out_channels": [64, 128]}``.
        conditional: whether the network is conditioned on the class.
        prediction: what the network predicts: noise (``"epsilon"``), ``"v_prediction"`` or the image (``"sample"``).
        timesteps: number of noise levels T.
        beta_schedule: ``"linear"``, DDPM's, or ``"cosine"``, better for small images.
        loss_weighting: ``"uniform"``, DDPM's simple loss, or ``"min_snr"``.
        snr_gamma: of ``"min_snr"``, positive.
        label_dropout: share of the labels, in [0, 1), withheld from a conditional network in training; guidance needs
            some.
        gradient_checkpointing: recompute activations in the backward pass, which saves memory and takes time.
        init_from: file whose weights the network starts from; unlike resuming, nothing else is taken from it.
        compile: ``True`` compiles the network when it first runs, ``"blocks"`` each of its residual blocks separately,
            which compiles faster because equal blocks are compiled once.
        **options: those of :class:`AttentionOptions` and of :class:`OptimizationOptions`.

    Raises:
        ValueError: if a name is unknown, a number is out of range, the network does not suit the images, or
            ``compile="blocks"`` finds no residual block.
        ImportError: if diffusers is not installed.

    Source:
        arXiv 2006.11239 (DDPM), 2010.02502 (DDIM), 2211.01095 (DPM-Solver++), 2207.12598 (guidance), 2303.09556
        (min-SNR).

    Example:
        >>> network = {"block_out_channels": [16, 32], "layers_per_block": 1}
        >>> task = DiffusionTask("unet", image_shape=[1, 8, 8], backbone_args=network, attention="dia-lstm")
        >>> task.sample(2, steps=2).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int | None = None,
        *,
        image_shape: list[int] | None = None,
        backbone_args: dict[str, Any] | None = None,
        conditional: bool = False,
        prediction: Prediction = "epsilon",
        timesteps: int = 1000,
        beta_schedule: BetaSchedule = "linear",
        loss_weighting: LossWeighting = "uniform",
        snr_gamma: float = 5.0,
        label_dropout: float = 0.1,
        gradient_checkpointing: bool = False,
        init_from: str | None = None,
        compile: Compile = False,
        **options: Unpack[TaskOptions],
    ) -> None:
        arguments = dict(locals())
        super().__init__(**options)
        check_choice("loss_weighting", loss_weighting, get_args(LossWeighting))
        if not snr_gamma > 0:
            raise ValueError(f"snr_gamma must be positive, got {snr_gamma}. 5 is usual.")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {label_dropout}.")
        if conditional and (num_classes is None or num_classes < 1):
            raise ValueError(f"num_classes must be 1 or more for conditional=True, got {num_classes}.")
        self.shape = check_image_shape(image_shape)
        self.remember(arguments)
        self.num_classes = num_classes
        self.no_class = num_classes if conditional else None
        self.loss_weighting = loss_weighting
        self.snr_gamma = float(snr_gamma)
        self.label_dropout = float(label_dropout)
        self.noise = NoiseSchedule(prediction=prediction, timesteps=timesteps, beta_schedule=beta_schedule)
        self.backbone = _backbone(backbone, backbone_args or {}, self.shape, self.no_class)
        example = self._example()
        parts = parts_to_compile(compile, self.backbone, self.backbone, example)
        self.attach_attention(self.backbone, example)
        if gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        if init_from is not None:
            rank_zero_info(load_weights(self.backbone, init_from))
        self.freeze_parameters()
        self.compile_parts(parts)
        self._symmetric = False
        self.val_loss = Mean()
        self.test_loss = Mean()

    def forward(self, images: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the network's prediction ``[B, C, H, W]``.

        Args:
            images: noisy ones ``[B, C, H, W]``.
            timesteps: ``[B]`` int64 in 0..T - 1.
            labels: ``[B]`` int64 in 0..K; ``None`` stands for no class. Ignored by an unconditional task.
        """
        if self.no_class is None:
            labels = None
        elif labels is None:
            labels = torch.full_like(timesteps, self.no_class)
        return predict(self.backbone, images, timesteps, labels)

    def _example(self) -> dict[str, Tensor]:
        """Return the backbone's inputs by the names of its arguments."""
        timesteps = torch.zeros(2, dtype=torch.long, device="meta")
        images = images_like(self.backbone, self.shape)
        example = dict(zip(inspect.signature(self.backbone.forward).parameters, (images, timesteps), strict=False))
        return example if self.no_class is None else {**example, "class_labels": timesteps}

    # ---- sampling

    def sample(
        self,
        count: int,
        *,
        classes: int | Sequence[int] | None = None,
        steps: int = 25,
        guidance: float = 1.0,
        sampler: Sampler = "ddim",
        seed: int = 0,
        batch_size: int = 64,
        first: int = 0,
        progress: bool = False,
        trace: bool = False,
    ) -> Tensor:
        """Generate images, in evaluation mode and with the network's current weights.

        The noise of image i depends only on ``seed`` and ``first + i``, so the images are the same for any batch size,
        on any device and in any number of parts, up to rounding.

        Args:
            count: how many images, 1 or more.
            classes: for a conditional task, one class for all or one per image; ``None`` cycles through the classes.
            steps: how often the network runs per image; for ``"ddim"`` and ``"ddpm"`` a divisor of ``timesteps``.
            guidance: guidance scale: 1 is none, more makes images more typical and less diverse, 0 ignores the class.
                Values other than 1 run the network twice.
            sampler: ``"ddim"`` (deterministic, good from 20 steps on), ``"ddpm"`` (ancestral, for 1000 steps) or
                ``"dpm++"`` (DPM-Solver++, second order, good from 10 steps on).
            seed: 0 or more.
            batch_size: images at a time.
            first: index of the first image.
            progress: show a progress bar.
            trace: return the network's estimate of the image at up to 8 steps, from the first to the last.

        Returns:
            Images ``[count, C, H, W]`` in [0, 1] on the task's device; with ``trace`` ``[count, K, C, H, W]``.

        Raises:
            ValueError: if a number is out of its range or does not fit the task.
        """
        for name, value, least in (("count", count, 1), ("batch_size", batch_size, 1), ("first", first, 0)):
            check_least(name, value, least)
        labels = class_labels(count, classes, first=first, no_class=self.no_class)
        denoising = self.denoising(steps=steps, guidance=guidance, sampler=sampler, seed=seed)
        parts = []
        bar = tqdm(total=count * steps, desc="sampling", unit="step", disable=not progress)
        with bar, evaluating(self.backbone):
            for start in range(0, count, batch_size):
                chosen = range(start, min(start + batch_size, count))
                part = None if labels is None else labels[chosen.start : chosen.stop].to(self.device)
                indices = [first + i for i in chosen]
                count_steps = partial(bar.update, len(indices))
                parts.append(denoising.run(indices, part, self.shape, after_step=count_steps, trace=trace))
        return torch.cat(parts)

    def denoising(self, *, steps: int, guidance: float, sampler: Sampler, seed: int) -> Denoising:
        """Return the process that :meth:`sample` runs for these options, with its ``timesteps``.

        Raises:
            ValueError: if a number is out of its range or does not fit the task.
        """
        if guidance != 1 and self.no_class is not None and self.label_dropout == 0:
            raise ValueError(f"guidance={guidance} needs a task that was trained with label_dropout above 0.")
        new_scheduler = partial(self.noise.sampler, sampler, steps)
        return Denoising(self.backbone, new_scheduler, guidance=guidance, no_class=self.no_class, seed=seed)

    # ---- losses

    def losses(self, images: Tensor, labels: Tensor | None, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the weighted mean squared error ``[B]`` of the network's predictions.

        Args:
            images: ``[B, C, H, W]`` in [-1, 1].
            labels: ``[B]`` int64 in 0..K, or ``None``.
            noise: standard normal, shaped like ``images``.
            timesteps: ``[B]`` int64 in 0..T - 1.
        """
        noisy = self.noise.add_noise(images, noise, timesteps)
        prediction = self(noisy.to(images.dtype), timesteps, labels)
        target = self.noise.target(images, noise, timesteps)
        losses = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
        if self.loss_weighting == "min_snr":
            losses = losses * self.noise.min_snr_weights(timesteps, self.snr_gamma)
        return losses

    def training_noise(self, images: Tensor, batch_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise shaped like ``images``, timesteps ``[B]`` and a mask ``[B]`` of dropped labels for training."""
        # every process draws its own; the global generators would be identical in all of them
        key = (torch.initial_seed(), self.global_rank, self.current_epoch, batch_index)
        generator = seeded_generator(*key, device=images.device)
        options: dict[str, Any] = {"generator": generator, "device": images.device}
        # half precision changes the default type
        noise = torch.randn(images.shape, dtype=torch.float32, **options)
        timesteps = torch.randint(self.noise.timesteps, (len(images),), **options)
        return noise, timesteps, torch.rand(len(images), dtype=torch.float32, **options) < self.label_dropout

    def evaluation_noise(self, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise shaped like ``images`` and timesteps ``[B]``, the same for an index ``[B]`` in every epoch."""
        noise, timesteps = [], []
        for position in index.clamp(min=0).tolist():
            generator = seeded_generator(_EVALUATION_SEED, position)
            noise.append(torch.randn(images.shape[1:], generator=generator, dtype=torch.float32))
            timesteps.append(torch.randint(self.noise.timesteps, (), generator=generator))
        return torch.stack(noise).to(images.device), torch.stack(timesteps).to(images.device)

    def evaluation_loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, summed over its images, with the noise and timesteps of validation and test."""
        images, labels, rest = _unpack(batch)
        labels = self._check_batch(images, labels, 0)
        index = rest[0] if rest else torch.arange(len(images))
        return self.losses(images, labels, *self.evaluation_noise(images, index)).sum()

    # ---- data

    def setup(self, stage: str) -> None:
        """Take class names from the data module, and refuse pixels that are not in [-1, 1]."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        self._symmetric = hasattr(datamodule, "normalization")  # if it gets past the check
        mean, std = getattr(datamodule, "normalization", ((0.5,), (0.5,)))
        if {*mean, *std} != {0.5}:
            raise ValueError(
                f"DiffusionTask needs images in [-1, 1], but the data subtract {list(mean)} and divide by {list(std)}. "
                "Set pixel_range='symmetric' (--data.pixel_range symmetric)."
            )

    def _check_batch(self, images: Tensor, labels: Tensor | None, batch_index: int) -> Tensor | None:
        """Refuse an unsuitable batch; return its labels as int64."""
        check_dtype(images, self.backbone)
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"The images have the shape {list(images.shape[1:])}, but the network was built for image_shape "
                f"{list(self.shape)}. Change image_size or channels of the data, or image_shape."
            )
        if self.no_class is not None and (labels is None or labels.ndim != 1):
            raise ValueError("A conditional task needs one label per image: disable mixup and cutmix.")
        if self.no_class is not None and labels is not None:
            labels = self._known_labels(labels, self.no_class, batch_index)
        if batch_index == 0:  # once per epoch, since it waits for the device
            self._check_pixels(*pixel_range(images))
        return labels

    def _known_labels(self, labels: Tensor, no_class: int, batch_index: int) -> Tensor:
        told = labels == no_class
        numbers = class_numbers(labels.masked_fill(told, 0), no_class, look=batch_index == 0)
        if batch_index == 0 and bool(told.any()):
            self.tell(
                "labels",
                f"Some images have the label {no_class}, which stands for no class (num_classes={no_class}). If it is "
                "a class, count from 0, or raise num_classes.",
            )
        return numbers.masked_fill(told, no_class)

    def _check_pixels(self, low: float, high: float) -> None:
        if max(-low, high) > 1.01:
            raise ValueError(
                f"The images must be in [-1, 1], but range from {low:.3g} to {high:.3g}. Set pixel_range='symmetric' "
                "in the data module, or subtract 0.5 and divide by 0.5."
            )
        if not self._symmetric:
            self.tell("range", not_symmetric(low, high))

    # ---- steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels, _ = _unpack(batch)
        labels = self._check_batch(images, labels, batch_idx)
        noise, timesteps, dropped = self.training_noise(images, batch_idx)
        if self.no_class is not None and labels is not None:
            labels = labels.masked_fill(dropped, self.no_class)
        loss = self.losses(images, labels, noise, timesteps).mean()
        self.check_loss(loss, batch_idx)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Update the loss; return the index and the losses ``[B]`` of the images."""
        outputs = self._evaluate(batch, batch_idx, self.val_loss)
        self.log("val/loss", self.val_loss, prog_bar=True)
        return outputs

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Update the loss; return the index and the losses ``[B]`` of the images."""
        outputs = self._evaluate(batch, batch_idx, self.test_loss)
        self.log("test/loss", self.test_loss)
        return outputs

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Refuse: images are not made from images.

        Raises:
            ValueError: always.
        """
        raise ValueError("DiffusionTask makes images from noise and has nothing to predict: use DiffusionTask.sample.")

    def _evaluate(self, batch: Any, batch_index: int, metric: Mean) -> dict[str, Tensor]:
        images, labels, rest = _unpack(batch)
        labels = self._check_batch(images, labels, batch_index)
        index = self.sample_index(images, rest)
        losses = self.losses(images, labels, *self.evaluation_noise(images, index))
        counts = index >= 0
        if counts.any():  # metrics reject an empty batch
            metric.update(losses[counts])
        return {"index": index, "losses": losses}


def _unpack(batch: Any) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
    if isinstance(batch, Tensor):
        return batch, None, ()
    images, *rest = batch
    return images, rest[0] if rest else None, rest[1:]


def _backbone(backbone: Backbone, args: dict[str, Any], shape: tuple[int, int, int], num_classes: int | None) -> Any:
    check_is_no_mark("backbone", backbone)
    if isinstance(backbone, str):
        return get_denoiser(backbone, image_shape=shape, num_classes=num_classes, **args)  # type: ignore[arg-type]
    if args:
        raise ValueError("backbone_args are for a named backbone; this one is an object. Omit them.")
    return backbone
