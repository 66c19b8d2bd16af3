"""Images as a frozen network sees them, gathered from all processes."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from dia_lightning._apportion import apportion
from dia_lightning.tasks.generation_metrics import DescribedImages
from dia_lightning.tasks.image_features import ImageFeatures

ImageBatch = tuple[Tensor, Tensor, Tensor]  # images [B, C, H, W] in [0, 1], labels [B], index [B]


def real_batches(data: Any, split: str, count: int | None, quick: int | None) -> Iterator[ImageBatch]:
    for images, labels, index in islice(data.evaluation_dataloader(split, count=count), quick):
        yield data.denormalize(images), labels, index


def labels_in_shares(labels: Tensor, count: int) -> Tensor:
    """Return labels ``[count]`` in the shares that classes have among others, sorted."""
    counts = torch.from_numpy(apportion(labels.bincount().numpy(), count))
    return torch.arange(len(counts)).repeat_interleave(counts)


def describe(judge: ImageFeatures, batches: Iterable[ImageBatch], name: str, trainer: Trainer) -> DescribedImages:
    """Return what a judge makes of images, gathered from all processes and in the order of their index."""
    device = trainer.strategy.root_device
    parts: list[tuple[Tensor, ...]] = []
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    bar = tqdm(desc=f"scoring {name} images", unit="image", disable=None if shown else True)  # None: on a terminal
    with bar, torch.no_grad():
        for images, labels, index in batches:
            pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)  # as in a PNG file; real ones as they were
            features, logits = judge(pixels.to(device))
            parts.append((features.float().cpu(), logits.float().cpu(), labels.cpu(), index.cpu()))
            bar.update(len(index))
    features, logits, labels, index = (_gather(trainer, torch.cat(column)) for column in zip(*parts, strict=True))
    order = index.argsort()[int((index < 0).sum()) :]
    return DescribedImages(features[order], logits[order], labels[order])


def _gather(trainer: Trainer, own: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return own
    everything: Tensor = trainer.strategy.all_gather(own.to(trainer.strategy.root_device))
    return everything.reshape(-1, *own.shape[1:]).cpu()
