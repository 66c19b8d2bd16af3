"""Scores of what a diffusion task generates."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from dia_lightning.callbacks._described_images import ImageBatch, describe, labels_in_shares, real_batches
from dia_lightning.callbacks._sampling import Sampling, is_sharded
from dia_lightning.tasks import Sampler
from dia_lightning.tasks.base import brief
from dia_lightning.tasks.generation_metrics import (
    DescribedImages,
    class_agreement,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from dia_lightning.tasks.image_features import ClassifierFeatures, ImageFeatures, InceptionFeatures

#: As ``inception``: torch-fidelity fetches the weights.
DOWNLOAD = "download"


class GenerationScores(Callback):
    """Compare images that the task generates with the training images, at the end of the test.

    With a classifier of this package, meant for small images: ``test/frechet_distance``, the Fréchet distance between
    the features of generated and of training images, which is not the FID, because that needs Inception; and of a
    conditional task ``test/class_agreement``, the share of images that the classifier takes for the class that was
    asked for. With Inception, meant for natural images: ``test/fid``, ``test/kid`` and ``test/inception_score``, the
    latter two with ``_std``.

    Fréchet distances depend on the number of images, ``test/generated_images``. So every score stands beside the same
    of as many real images that were not trained on: its name ends in ``_real``, and ``test/real_images`` tells if there
    were fewer. The reference of all distances are the training images without augmentation, and a conditional task is
    asked for the classes in the shares that they have there.

    The networks that judge are frozen, and neither in the checkpoint nor in the optimizer; training goes on with the
    random numbers that it would have without this callback. With :class:`EMA` the images come from the averaged
    weights, wherever it stands among the callbacks. In a distributed run every process makes a part of the images,
    which are the same as those of one process. The data module is one of this package's for classification, or has its
    ``evaluation_dataloader`` and ``denormalize``.

    Args:
        classifier: checkpoint of a :class:`~dia_lightning.tasks.ClassificationTask` of the same classes; images are
            brought to the size and channels that it knows.
        inception: ``"download"``, or the file ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity.
        num_samples: number of generated images, 10 or more; 50,000 are usual for the FID.
        batch_size: images at a time, for sampling.
        every_n_epochs: score at every validation of every n-th training epoch too, as ``val/...``; ``None`` scores in
            the test only.
        steps: how often the network runs per image; for ``"ddim"`` and ``"ddpm"`` a divisor of the task's timesteps.
        guidance: weight of the class; 1 is none.
        sampler: ``"ddim"``, ``"ddpm"`` or ``"dpm++"``.
        seed: of the noise, 0 or more.

    Raises:
        ValueError: if an argument is out of range or does not fit the task, or nothing is there to judge by.

    Source:
        arXiv 1706.08500 (FID), 1801.01401 (KID), 1606.03498 (Inception score).

    Example:
        >>> scores = GenerationScores(classifier="runs/digits/version_0/checkpoints/last.ckpt", num_samples=250)
        >>> GenerationScores()
        Traceback (most recent call last):
        ...
        ValueError: GenerationScores needs something to judge by: classifier=CHECKPOINT, or inception="download".
    """

    def __init__(
        self,
        *,
        classifier: str | None = None,
        inception: str | None = None,
        num_samples: int = 1000,
        batch_size: int = 100,
        every_n_epochs: int | None = None,
        steps: int = 25,
        guidance: float = 1.0,
        sampler: Sampler = "ddim",
        seed: int = 0,
    ) -> None:
        if classifier is None and inception is None:
            raise ValueError(
                'GenerationScores needs something to judge by: classifier=CHECKPOINT, or inception="download".'
            )
        for name, value, least in (("num_samples", num_samples, 10), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be 1 or more, or None for the test only, got {every_n_epochs}.")
        self.classifier = classifier
        self.inception = inception
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.sampling = Sampling(steps, guidance, sampler, seed)
        self._judges: list[ImageFeatures] = []
        # what does not change between epochs
        self._references: dict[ImageFeatures, DescribedImages] = {}
        self._real_scores: dict[tuple[str, ImageFeatures], dict[str, float]] = {}
        self._scores: dict[str, float] = {}

    # ---- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the networks that judge, and refuse what could only fail after an epoch."""
        self.sampling.check(pl_module, type(self).__name__)
        if is_sharded(trainer):
            raise ValueError(
                f"GenerationScores cannot make images with {type(trainer.strategy).__name__}: no process has the whole "
                "network. Leave it out, and test the checkpoint on one device or with DDP."
            )
        data: Any = getattr(trainer, "datamodule", None)
        if not (hasattr(data, "evaluation_dataloader") and hasattr(data, "denormalize")):
            raise ValueError(
                f"GenerationScores needs a data module with evaluation_dataloader and denormalize, got "
                f"{type(data).__name__}. Use one of this package's, or leave the callback out."
            )
        data.evaluation_dataloader("train")  # says if there are no training data
        self._warn_if_rare(trainer, stage)
        self._references, self._real_scores = {}, {}  # the data may be others
        if not self._judges:
            with isolate_rng():  # networks begin with random weights
                self._judges = list(self._load_judges(trainer))
        for judge in self._judges:
            self._check_judge(judge, getattr(data, "class_names", None), getattr(pl_module, "shape", None))

    def _warn_if_rare(self, trainer: Trainer, stage: str) -> None:
        validated = trainer.check_val_every_n_epoch
        if stage != "fit" or self.every_n_epochs is None or validated is None or self.every_n_epochs % validated == 0:
            return
        both = math.lcm(self.every_n_epochs, validated)
        rank_zero_warn(
            f"every_n_epochs={self.every_n_epochs} of GenerationScores, but there is a validation after every "
            f"{validated} epochs only, so scores come after every {both} epochs. Change one of the two."
        )

    def _check_judge(self, judge: ImageFeatures, names: Any, shape: Any) -> None:
        if judge.class_names is not None and names is not None and list(names) != list(judge.class_names):
            raise ValueError(
                f"The classifier {self.classifier} knows the classes {brief(judge.class_names)}, but the data have "
                f"{brief(names)}. Take a classifier that was trained on the same classes."
            )
        if shape is not None and shape[0] not in judge.known_channels:
            raise ValueError(
                f"{type(judge).__name__} knows images of {' or '.join(map(str, judge.known_channels))} channels, "
                f"but the task makes images of {shape[0]}."
            )

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score after the first batch: by then averaged weights are in the model, whatever the order of callbacks."""
        if batch_idx == 0 and dataloader_idx == 0 and self._scores_now(trainer):
            with isolate_rng():  # loaders draw a seed for their processes
                self._scores = self._score(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores."""
        stage = "test" if trainer.testing else "val"
        named = {f"{stage}/{name}": value for name, value in self._scores.items()}
        pl_module.log_dict(named, batch_size=1, sync_dist=True)  # equal in all processes
        self._scores = {}

    on_validation_batch_end = on_test_batch_end
    on_validation_epoch_end = on_test_epoch_end

    def _scores_now(self, trainer: Trainer) -> bool:
        if trainer.testing:
            return True
        if trainer.sanity_checking or self.every_n_epochs is None:
            return False
        return trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _load_judges(self, trainer: Trainer) -> Iterator[ImageFeatures]:
        if self.classifier is not None:
            yield ClassifierFeatures(self.classifier)
        if self.inception is not None:
            weights = None if self.inception == DOWNLOAD else self.inception
            if trainer.local_rank > 0:
                trainer.strategy.barrier("weights of Inception")  # one process fetches the file, then all read it
            try:
                judge = InceptionFeatures(weights)
            finally:
                if trainer.local_rank == 0:
                    trainer.strategy.barrier("weights of Inception")
            yield judge

    # ---- what

    def _score(self, trainer: Trainer, task: Any) -> dict[str, float]:
        stage = "test" if trainer.testing else "val"
        scores: dict[str, float] = {}
        for judge in self._judges:
            judge.to(task.device)
            score = _inception_scores if isinstance(judge, InceptionFeatures) else _classifier_scores
            reference, real = self._real(trainer, judge, stage, score)
            generated = describe(judge, self._generated(trainer, task, reference), "generated", trainer)
            judge.cpu()
            found = score(generated, reference)
            found |= {name: value for name, value in real.items() if name.removesuffix("_real") in found}
            found |= {"generated_images": float(len(generated.labels)), "real_images": real["real_images"]}
            rank_zero_info(f"{_sentence(stage, found, len(reference.labels))}; {self.sampling}")
            scores |= found
        return scores

    def _real(
        self, trainer: Trainer, judge: ImageFeatures, stage: str, score: "_Score"
    ) -> tuple[DescribedImages, dict[str, float]]:
        """Return the training images as a judge sees them, and the scores of other real images."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        quick = _batches_of_a_quick_run(trainer)
        if judge not in self._references:
            self._references[judge] = describe(judge, real_batches(data, "train", None, quick), "training", trainer)
        reference = self._references[judge]
        if (stage, judge) not in self._real_scores:
            real = describe(judge, real_batches(data, stage, self._count(trainer), quick), "real", trainer)
            scores = {f"{name}_real": value for name, value in score(real, reference).items()}
            self._real_scores[stage, judge] = scores | {"real_images": float(len(real.labels))}
        return reference, self._real_scores[stage, judge]

    def _count(self, trainer: Trainer) -> int:
        quick = _batches_of_a_quick_run(trainer)
        return self.num_samples if quick is None else min(self.num_samples, quick * self.batch_size)

    def _generated(self, trainer: Trainer, task: Any, reference: DescribedImages) -> Iterator[ImageBatch]:
        """Yield this process's part of the images; all processes make equally many, the surplus is marked by -1."""
        count = self._count(trainer)
        labels = torch.full((count,), -1) if task.no_class is None else labels_in_shares(reference.labels, count)
        share = -(-count // trainer.world_size)
        start = trainer.global_rank * share
        for first in range(start, start + share, self.batch_size):
            index = torch.arange(first, min(first + self.batch_size, start + share))
            asked = labels[index.clamp(max=count - 1)]
            classes = None if task.no_class is None else asked.tolist()
            images = self.sampling.images(task, len(index), classes, first=first, batch_size=self.batch_size)
            if not images.isfinite().all():
                raise ValueError(
                    f"The task makes images that are not finite, with {self.sampling}: its network diverged, or "
                    "guidance is too large."
                )
            yield images, asked, torch.where(index < count, index, -1)


_Score = Callable[[DescribedImages, DescribedImages], dict[str, float]]


def _batches_of_a_quick_run(trainer: Trainer) -> int | None:
    """Return how many batches ``fast_dev_run`` asks for."""
    return int(getattr(trainer, "fast_dev_run", 0)) or None


def _classifier_scores(images: DescribedImages, reference: DescribedImages) -> dict[str, float]:
    scores = {"frechet_distance": frechet_distance(images, reference)}
    if (images.labels >= 0).all():  # of an unconditional task nobody asks for a class
        scores["class_agreement"] = class_agreement(images)
    return scores


def _inception_scores(images: DescribedImages, reference: DescribedImages) -> dict[str, float]:
    kid, inception = kernel_distance(images, reference), inception_score(images)
    scores = {"fid": frechet_distance(images, reference), "kid": kid[0], "inception_score": inception[0]}
    deviations = {"kid_std": kid[1], "inception_score_std": inception[1]}
    return scores | {name: value for name, value in deviations.items() if value is not None}


def _sentence(stage: str, scores: dict[str, float], references: int) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if not name.endswith("_images"))
    generated, real = int(scores["generated_images"]), int(scores["real_images"])
    return (
        f"{stage}: {values} ({generated} generated and {real} real images, each compared with {references} training "
        "images)"
    )
