"""Scores of what a diffusion task generates."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from dia_lightning.callbacks._sampling import Sampler, Sampling
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
    of as many real images that were not trained on, chosen evenly over the classes: its name ends in ``_real``, and
    ``test/real_images`` tells if there were fewer. The reference of all distances are the training images without
    augmentation.

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
        every_n_epochs: score after every n-th training epoch too, where that has a validation, as ``val/...``; ``None``
            scores in the test only.
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
        self._unchanging: dict[tuple[str, str, ImageFeatures], DescribedImages] = {}  # real images
        self._scores: dict[str, float] = {}

    # ---- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the networks that judge, and refuse what could only fail after an epoch."""
        self.sampling.check(pl_module, type(self).__name__)
        data = getattr(trainer, "datamodule", None)
        if not (hasattr(data, "evaluation_dataloader") and hasattr(data, "denormalize")):
            raise ValueError(
                f"GenerationScores needs a data module with evaluation_dataloader and denormalize, got "
                f"{type(data).__name__}. Use one of this package's, or leave the callback out."
            )
        if not self._judges:
            with isolate_rng():  # networks begin with random weights
                self._judges = list(self._load_judges(trainer))
        names = getattr(data, "class_names", None)
        for judge in self._judges:
            if judge.class_names is not None and names is not None and list(names) != list(judge.class_names):
                raise ValueError(
                    f"The classifier {self.classifier} knows the classes {_brief(judge.class_names)}, but the data "
                    f"have {_brief(names)}. Take a classifier that was trained on the same classes."
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
        pl_module.log_dict({f"{stage}/{name}": value for name, value in self._scores.items()}, batch_size=1)
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
            if weights is None and not trainer.is_global_zero:
                trainer.strategy.barrier("download")  # rank zero fetches the file, then all read it
            judge = InceptionFeatures(weights)
            if weights is None and trainer.is_global_zero:
                trainer.strategy.barrier("download")
            yield judge

    # ---- what

    def _score(self, trainer: Trainer, task: Any) -> dict[str, float]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        stage = "test" if trainer.testing else "val"
        quick = int(getattr(trainer, "fast_dev_run", 0)) or None  # batches of everything
        count = self.num_samples if quick is None else min(self.num_samples, quick * self.batch_size)
        images: dict[str, Callable[[], Iterable[_Batch]]] = {
            "generated": lambda: self._generated(trainer, task, count),
            "real": lambda: _real(data, data.evaluation_dataloader(stage, count=count), quick),
            "reference": lambda: _real(data, data.evaluation_dataloader("train"), quick),
        }
        scores: dict[str, float] = {}
        for judge in self._judges:
            judge.to(task.device)
            described = {}
            for name, make in images.items():
                key = (stage, name, judge)
                described[name] = self._unchanging.get(key) or _describe(judge, make(), name, trainer, task)
                if name != "generated":
                    self._unchanging[key] = described[name]
            judge.cpu()
            by_inception = isinstance(judge, InceptionFeatures)
            scores |= _inception_scores(described) if by_inception else _classifier_scores(described)
            sizes = {name: len(part.labels) for name, part in described.items()}
            scores |= {f"{name}_images": float(sizes[name]) for name in ("generated", "real")}
            rank_zero_info(_sentence(stage, scores, sizes))
        return scores

    def _generated(self, trainer: Trainer, task: Any, count: int) -> "Iterator[_Batch]":
        """Yield this process's part of the images; all processes make equally many, the surplus is marked by -1."""
        share = -(-count // trainer.world_size)
        start = trainer.global_rank * share
        for first in range(start, start + share, self.batch_size):
            index = torch.arange(first, min(first + self.batch_size, start + share))
            labels = torch.full_like(index, -1) if task.no_class is None else index % task.no_class
            classes = None if task.no_class is None else labels.tolist()
            images = self.sampling.images(task, len(index), classes, first=first, batch_size=self.batch_size)
            if not images.isfinite().all():
                raise ValueError(
                    f"The task makes images that are not finite, with {self.sampling}: its network diverged, or "
                    "guidance is too large."
                )
            yield images, labels, torch.where(index < count, index, -1)


_Batch = tuple[Tensor, Tensor, Tensor]  # images [B, C, H, W] in [0, 1], labels [B], index [B]


def _real(data: Any, loader: Iterable[Any], batches: int | None) -> Iterator[_Batch]:
    for images, labels, index in islice(loader, batches):
        yield data.denormalize(images), labels, index


def _describe(
    judge: ImageFeatures, batches: Iterable[_Batch], name: str, trainer: Trainer, task: Any
) -> DescribedImages:
    """Return what a judge makes of images, gathered from all processes and in the order of their index."""
    parts: list[tuple[Tensor, ...]] = []
    # a bar for rank zero, on a terminal
    bar = tqdm(desc=f"scoring {name} images", unit="image", disable=None if trainer.is_global_zero else True)
    with bar, torch.no_grad():
        for images, labels, index in batches:
            pixels = (images * 255).round().to(torch.uint8)  # as in a PNG file; real ones become what they were
            parts.append((*judge(pixels.to(task.device)), labels.to(task.device), index.to(task.device)))
            bar.update(len(index))
    gathered = [_gather(trainer, torch.cat(column)) for column in zip(*parts, strict=True)]
    features, logits, labels, index = gathered
    order = index.argsort()[int((index < 0).sum()) :]
    return DescribedImages(features[order].float(), logits[order].float(), labels[order])


def _gather(trainer: Trainer, own: Tensor) -> Tensor:
    everything: Tensor = trainer.strategy.all_gather(own)
    return everything.reshape(-1, *own.shape[1:]).cpu()


def _classifier_scores(images: dict[str, DescribedImages]) -> dict[str, float]:
    generated, real, reference = images["generated"], images["real"], images["reference"]
    scores = {
        "frechet_distance": frechet_distance(generated, reference),
        "frechet_distance_real": frechet_distance(real, reference),
    }
    if (generated.labels >= 0).all():  # of an unconditional task nobody asked for a class
        scores |= {"class_agreement": class_agreement(generated), "class_agreement_real": class_agreement(real)}
    return scores


def _inception_scores(images: dict[str, DescribedImages]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name, ending in (("generated", ""), ("real", "_real")):
        distances = {"fid": frechet_distance(images[name], images["reference"])}
        distances["kid"], distances["kid_std"] = kernel_distance(images[name], images["reference"])
        distances["inception_score"], distances["inception_score_std"] = inception_score(images[name])
        scores |= {f"{score}{ending}": value for score, value in distances.items()}
    return scores


def _sentence(stage: str, scores: dict[str, float], sizes: dict[str, int]) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if not name.endswith("_images"))
    return (
        f"{stage}: {values} ({sizes['generated']} generated and {sizes['real']} real images, each compared with "
        f"{sizes['reference']} training images)"
    )


def _brief(names: Any) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:5]) + (f", ... ({len(shown)})" if len(shown) > 5 else "")
