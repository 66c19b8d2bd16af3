"""Training samples depend on the seed and their place alone, and a sampler goes on where an epoch was left."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from dia_lightning.datamodules import DIADataModule, DigitsDataModule, ImageFolderDataModule, ImageTableDataModule
from dia_lightning.datamodules._draws import Draw, DrawnCollate, ShuffledSampler, load_drawn


def sampler(rank: int = 0, ranks: int = 1, seed: int = 5) -> ShuffledSampler:
    return ShuffledSampler(range(23), num_replicas=ranks, rank=rank, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_sample_of_an_epoch_that_goes_on_is_seen_twice_or_never(ranks: int) -> None:
    seen: list[int] = []
    for rank in range(ranks):
        first, second = sampler(rank, ranks), sampler(rank, ranks)
        first.set_epoch(2)
        second.start_at(2, 8)
        seen += [*list(first)[:8], *second]
        assert len(second) == len(first)
    assert set(seen) == set(range(23))
    assert len(seen) == 23 + (ranks == 2)  # one fills up
    second.set_epoch(3)
    assert len(list(second)) == len(second)


def test_nobody_needs_to_tell_the_epoch() -> None:
    passes = sampler()
    first, second = list(passes), list(passes)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(23))
    again = sampler()
    again.set_epoch(1)
    assert list(again) == second
    assert list(sampler(seed=6)) != first


def chance() -> tuple[Any, ...]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def seed_all() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def test_a_draw_has_random_numbers_of_its_own_and_takes_none_of_the_process() -> None:
    seed_all()
    expected = [chance(), chance()]
    seed_all()
    assert chance() == expected[0]
    first, again, other = (
        load_drawn(lambda _: chance(), Draw(3, (0, epoch, place))) for epoch, place in ((1, 7), (1, 7), (1, 8))
    )
    batch = DrawnCollate(lambda samples: chance())([first, other])
    assert chance() == expected[1]
    assert first == again != other
    assert batch == DrawnCollate(lambda samples: chance())([again]) != first


def test_augmentation_depends_on_the_seed_and_the_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def images(seed: int) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data = DigitsDataModule(image_size=8, batch_size=8, limit=16, num_workers=0, augment="strong", mixup=1.0)
        return torch.cat([images for images, _ in data.train_dataloader()])

    assert torch.equal(images(1), images(1))
    assert not torch.equal(images(1), images(2))


@pytest.mark.parametrize("kind", [DigitsDataModule, ImageFolderDataModule, ImageTableDataModule])
def test_every_data_module_notes_its_place_in_a_checkpoint(tmp_path: Path, kind: type[DIADataModule]) -> None:
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "train.csv").write_text("file,label\n1.png,ant\n", encoding="utf-8")
    data = kind(root=tmp_path)
    data.trainer = Trainer(accelerator="cpu", logger=False)
    assert {"seed", "epoch", "batches", "batch_size", "processes"} <= set(data.state_dict())
