from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dia_lightning.datamodules import DigitsDataModule
from tests.datamodules.tiny_data import samples_of


def _digits(**options: int) -> DigitsDataModule:
    data = DigitsDataModule(augment="none", pin_memory=False, **options)
    data.setup()
    return data


def test_sizes_of_the_splits_are_1297_250_250() -> None:
    data = _digits()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(samples_of(loader)) for loader in loaders] == [1297, 250, 250]


def test_splits_together_are_the_digits_of_scikit_learn() -> None:
    data = _digits(image_size=8, channels=1)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    images = [sample[0] for loader in loaders for sample in samples_of(loader)]
    sixteenths = (data.denormalize(torch.stack(images)) * 16).round().flatten(1).int().tolist()
    assert sorted(sixteenths) == sorted(load_digits().data.astype(int).tolist())


def test_test_set_has_all_classes_and_does_not_depend_on_the_split_seed() -> None:
    one, other = (_digits(split_seed=seed, image_size=8) for seed in (1, 2))
    for (first, labels, _), (second, _, _) in zip(one.test_dataloader(), other.test_dataloader(), strict=True):
        assert torch.equal(first, second)
        assert set(labels.tolist()) == set(range(10))


def test_normalised_training_images_have_mean_zero_and_deviation_one() -> None:
    images = torch.stack([image for image, _ in samples_of(_digits().train_dataloader())])
    assert images.shape[1:] == (3, 32, 32)
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_enlarged_digits_keep_their_mean_brightness() -> None:
    small, large = (_digits(image_size=size, channels=1) for size in (8, 32))
    means = [d.denormalize(next(iter(d.test_dataloader()))[0]).mean((1, 2, 3)).numpy() for d in (small, large)]
    np.testing.assert_allclose(means[0], means[1], atol=0.01)


def test_augmentation_moves_digits_a_little_and_never_mirrors_them() -> None:
    data = DigitsDataModule(channels=1, pin_memory=False)
    data.setup("fit")
    plain: Any = _digits(channels=1).train_dataloader().dataset
    moved: Any = data.train_dataloader().dataset
    torch.manual_seed(0)
    upright = 0
    for i in range(200):
        original, changed = plain[i][0], moved[i][0]
        assert not torch.equal(original, changed)
        upright += int((original - changed).abs().mean() < (original.flip(-1) - changed).abs().mean())
    assert upright > 160  # about half of them if every second digit were mirrored


@pytest.mark.parametrize(("option", "value"), [("channels", 2), ("image_size", 7)])
def test_impossible_size_is_refused(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value}"):
        DigitsDataModule(**{option: value})
