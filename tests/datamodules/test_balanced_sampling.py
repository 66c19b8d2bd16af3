"""Training samples that are drawn so that every class comes equally often."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torchvision.transforms import v2

from dia_lightning.datamodules import ArraySource, DigitsDataModule
from dia_lightning.datamodules._sampling import BalancedSampler, ClassificationSamples
from dia_lightning.tasks import ClassificationTask
from tests.datamodules.tiny_data import pixels, pretend_ranks
from tests.two_processes import on_two_processes

LABELS = np.repeat([0, 1, 2], [70, 25, 6])  # 101 samples; class 3 has none


def samples() -> ClassificationSamples:
    source = ArraySource(pixels(101, 4, 4), LABELS, split="train", channels=1)
    return ClassificationSamples(source, np.arange(101), transform=v2.PILToTensor(), role="train")


def draws(ranks: int, *, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    samplers = [BalancedSampler(samples(), num_replicas=ranks, rank=rank, seed=seed) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize(("ranks", "length"), [(1, 101), (2, 51), (3, 34)])
def test_classes_come_equally_often_and_the_ranks_share_one_draw(ranks: int, length: int) -> None:
    parts = draws(ranks)
    assert [len(part) for part in parts] == [length] * ranks
    together = [position for part in parts for position in part]
    per_class = Counter(LABELS[together].tolist())
    assert set(per_class) == {0, 1, 2}
    assert max(per_class.values()) - min(per_class.values()) <= 1
    for label in range(3):  # nor is a sample of a class seen more often than another by two
        times = Counter(together)
        seen = [times[int(position)] for position in np.flatnonzero(label == LABELS)]
        assert max(seen) - min(seen) <= 1
    assert all(len(set(LABELS[part])) == 3 for part in parts)


def test_an_epoch_depends_on_its_number_and_the_seed_alone() -> None:
    assert draws(2, epoch=3) == draws(2, epoch=3)
    assert draws(2, epoch=3) != draws(2, epoch=4)
    assert draws(2, epoch=3) != draws(2, epoch=3, seed=1)


def test_all_images_of_a_frequent_class_are_seen_in_the_long_run_even_if_nobody_tells_the_epoch() -> None:
    sampler = BalancedSampler(samples(), num_replicas=1, rank=0, seed=0)
    assert {position for _ in range(30) for position in sampler} == set(range(101))


def test_data_modules_draw_of_the_training_part_and_keep_the_length_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    options: dict[str, Any] = {"image_size": 8, "batch_size": 8, "limit": 43, "num_workers": 0}
    data, usual = DigitsDataModule(sampling="balanced", **options), DigitsDataModule(**options)
    loader = data.train_dataloader()
    assert len(loader) == len(usual.train_dataloader()) == 5
    pretend_ranks(data, ranks=2, rank=1)
    part = data.train_dataloader()
    assert isinstance(part.sampler, BalancedSampler)
    assert (part.sampler.num_replicas, part.sampler.rank, part.sampler.seed) == (2, 1, 7)
    labels = [label for _, batch in loader for label in batch.tolist()]
    assert len(labels) == 40
    assert min(Counter(labels).values()) >= 1
    with pytest.raises(ValueError, match="sampling must be one of shuffle, balanced, got 'even'"):
        DigitsDataModule(sampling="even")


class Drawn(Callback):
    """Notes the labels of every training epoch in a file of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        with (self.folder / f"{trainer.current_epoch}-{trainer.global_rank}").open("a") as file:
            file.writelines(f"{label} {image.sum():.4f}\n" for image, label in zip(*batch, strict=True))


def test_lightning_leaves_each_process_its_own_part(tmp_path: Path) -> None:
    data = DigitsDataModule(
        image_size=8, batch_size=5, limit=40, sampling="balanced", augment="none", num_workers=0, drop_last=False
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Drawn(tmp_path)],
        **on_two_processes(),
    )
    trainer.fit(ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}), data)
    epochs = [[(tmp_path / f"{epoch}-{rank}").read_text().splitlines() for rank in (0, 1)] for epoch in (0, 1)]
    for first, second in epochs:
        assert len(first) == len(second) == 20
        # 4 images of each class, each once: nothing that both processes have
        assert len({*first, *second}) == 40
    assert epochs[0] != epochs[1]
