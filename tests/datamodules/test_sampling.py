import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dia_lightning.datamodules import ArraySource
from dia_lightning.datamodules._sampling import (
    ClassificationSamples,
    MixingCollate,
    PaddedSampler,
    Role,
    SampleError,
    balanced_subset,
    stratified_split,
)
from tests.datamodules.tiny_data import labels_in_turn, pixels

_LABELS = np.repeat([0, 1, 2], [60, 30, 10])


def _samples(count: int, role: Role = "eval") -> ClassificationSamples:
    source = ArraySource(pixels(count, 4, 4), labels_in_turn(count, 3), split="test", channels=1)
    return ClassificationSamples(source, np.arange(count), transform=v2.PILToTensor(), role=role)


def test_split_is_disjoint_and_complete() -> None:
    rest, drawn = stratified_split(_LABELS, 20, seed=1)
    assert sorted([*rest, *drawn]) == list(range(100))
    assert len(drawn) == 20


def test_split_keeps_the_class_proportions() -> None:
    _, drawn = stratified_split(_LABELS, 20, seed=1)
    assert np.bincount(_LABELS[drawn]).tolist() == [12, 6, 2]


def test_split_of_an_uneven_count_is_within_one_of_the_proportions() -> None:
    _, drawn = stratified_split(_LABELS, 17, seed=1)
    assert len(drawn) == 17
    assert np.abs(np.bincount(_LABELS[drawn], minlength=3) - 17 * np.array([0.6, 0.3, 0.1])).max() < 1


def test_split_never_changes_between_releases() -> None:
    _, drawn = stratified_split(np.arange(12) % 3, 6, seed=42)
    assert drawn.tolist() == [2, 3, 4, 9, 10, 11]


def test_split_depends_on_the_seed() -> None:
    assert stratified_split(_LABELS, 20, seed=1)[1].tolist() != stratified_split(_LABELS, 20, seed=2)[1].tolist()


def test_subset_takes_the_classes_in_turn_while_they_last() -> None:
    chosen = balanced_subset(_LABELS, 45, seed=0)
    assert np.bincount(_LABELS[chosen]).tolist() == [18, 17, 10]


def test_larger_subset_contains_the_smaller() -> None:
    assert set(balanced_subset(_LABELS, 10, seed=0)) < set(balanced_subset(_LABELS, 31, seed=0))


def test_subset_of_more_than_there_are_is_everything() -> None:
    assert balanced_subset(_LABELS, 1000, seed=0).tolist() == list(range(100))


@pytest.mark.parametrize("count", [1, 7, 8, 9])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_gets_as_many_and_every_sample_comes_once(count: int, ranks: int) -> None:
    dataset = _samples(count)
    seen = [[dataset[i][2] for i in PaddedSampler(dataset, num_replicas=ranks, rank=r)] for r in range(ranks)]
    assert len({len(indices) for indices in seen}) == 1
    everything = [index for indices in seen for index in indices]
    assert sorted(index for index in everything if index != -1) == list(range(count))
    assert everything.count(-1) < ranks


def test_sampler_tells_its_length() -> None:
    sampler = PaddedSampler(_samples(7), num_replicas=2, rank=1)
    assert len(list(sampler)) == len(sampler) == 4


@pytest.mark.parametrize(("role", "parts"), [("train", 2), ("eval", 3), ("predict", 2)])
def test_role_decides_what_a_sample_is_made_of(role: Role, parts: int) -> None:
    sample = _samples(5, role)[4]
    assert len(sample) == parts
    assert sample[-1] == (1 if role == "train" else 4)


def test_broken_sample_names_itself_and_its_index() -> None:
    source = ArraySource(pixels(3, 4, 4), [0, 1, 2], split="test", channels=1)
    dataset = ClassificationSamples(source, np.array([2, 0]), transform=v2.Normalize([0.0], [1.0]), role="eval")
    with pytest.raises(SampleError, match=r"^Sample 0 \(test/2\) cannot be loaded: .*\.$") as info:
        dataset[0]
    again = pickle.loads(pickle.dumps(info.value))
    assert type(again) is SampleError
    assert str(again) == str(info.value)


def test_padding_has_no_name() -> None:
    with pytest.raises(IndexError, match="padding"):
        _samples(3).name(-1)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_labels_sum_to_one(mixup: float, cutmix: float) -> None:
    collate = pickle.loads(pickle.dumps(MixingCollate(mixup=mixup, cutmix=cutmix, num_classes=5)))
    torch.manual_seed(0)
    images, labels = collate([(torch.rand(1, 8, 8), i % 5) for i in range(10)])
    assert images.shape == (10, 1, 8, 8)
    assert labels.shape == (10, 5)
    assert labels.dtype == torch.float32
    torch.testing.assert_close(labels.sum(1), torch.ones(10))
    assert ((labels > 0).sum(1) == 2).all()


def test_mixup_blends_images_as_it_blends_labels() -> None:
    torch.manual_seed(0)
    samples = [(torch.full((1, 2, 2), float(i)), i) for i in range(4)]
    images, labels = MixingCollate(mixup=1.0, cutmix=0.0, num_classes=4)(samples)
    torch.testing.assert_close(images[:, 0, 0, 0], labels @ torch.arange(4.0))


def test_both_mixings_are_used_when_both_are_on() -> None:
    torch.manual_seed(0)
    collate = MixingCollate(mixup=1.0, cutmix=1.0, num_classes=2)
    samples = [(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 1)]
    blended = [bool(((images > 0) & (images < 1)).any()) for images, _ in (collate(samples) for _ in range(20))]
    assert set(blended) == {True, False}  # mixup blends, cutmix does not
