import hashlib
import pickle
import subprocess
import sys
from typing import Any

import jsonargparse
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision.ops import box_iou, masks_to_boxes

from dia_lightning.datamodules import DigitScenesDataModule
from dia_lightning.datamodules import _scenes as _scenes_module
from dia_lightning.datamodules._scenes import SceneSource
from dia_lightning.datamodules._uci_digits import read_digits
from tests.datamodules.tiny_data import samples_of

SIZES = {"train_size": 40, "val_size": 20, "test_size": 20}


def _data(**options: Any) -> DigitScenesDataModule:
    settings: dict[str, Any] = {**SIZES, "masks": True, "pin_memory": False, **options}
    return DigitScenesDataModule(**settings)


def _scenes(data: DigitScenesDataModule) -> list[Any]:
    data.setup("fit")
    return samples_of(data.train_dataloader())


def _source(split: Any) -> SceneSource:
    data = _data()
    source = data.load_split(split)
    assert isinstance(source, SceneSource)
    return source


def _digest(samples: list[Any]) -> str:
    """Return a checksum of pixels, boxes and labels."""
    content = [(*sample[:1], sample[1]["boxes"], sample[1]["labels"]) for sample in samples]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for part in content for t in part)).hexdigest()


# Scenes are what they claim


def test_scene_has_one_to_five_objects_with_tight_boxes_around_their_masks() -> None:
    counts = set()
    for image, target in _scenes(_data()):
        counts.add(len(target["labels"]))
        assert image.shape == (3, 128, 128)
        assert torch.equal(target["boxes"], masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1]))
        assert target["masks"].sum(0).max() == 1  # no pixel belongs to two objects
        assert target["masks"].dtype == torch.uint8
        assert set(target["labels"].tolist()) <= set(range(1, 11))
    assert counts == {1, 2, 3, 4, 5}


def test_objects_overlap_little_and_stand_out_from_their_background() -> None:
    luma = torch.tensor([0.299, 0.587, 0.114])
    for image, target in _scenes(_data()):
        overlap = box_iou(target["boxes"], target["boxes"]).fill_diagonal_(0)
        assert overlap.max() < 0.2
        grey = (image * luma[:, None, None]).sum(0)
        background = grey[target["masks"].sum(0) == 0].mean()
        for mask in target["masks"]:
            assert (grey[mask == 1].mean() - background).abs() > 0.1


@pytest.mark.parametrize("size", [64, 128, 256])
def test_digits_grow_with_the_canvas(size: int) -> None:
    boxes = torch.cat([target["boxes"] for _, target in _scenes(_data(image_size=size))])
    heights = (boxes[:, 3] - boxes[:, 1]) / size
    assert 0.08 < heights.min() < 0.2
    assert 0.3 < heights.max() <= 0.375


def test_at_least_half_of_every_digit_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[int] = []
    place = _scenes_module._place

    def record(ink: Any, *rest: Any) -> Any:
        window = place(ink, *rest)
        whole.extend([] if window is None else [int(ink.sum())])
        return window

    monkeypatch.setattr(_scenes_module, "_place", record)
    shares = []
    source = _source("train")
    for position in range(40):
        whole.clear()
        visible = source.scene(position).masks.sum((1, 2))
        shares += (visible / np.array(whole)).tolist()
    assert 0.5 <= min(shares) < 0.98  # some are covered in part
    assert max(shares) == 1


def test_labels_are_the_digits_that_were_drawn() -> None:
    # One glyph alone is the source: every object must have its label, and about its shape.
    glyphs, digits = read_digits("train")
    source = SceneSource(glyphs[7:8], digits[7:8], count=5, size=128, seed=0, split="x", masks=True)
    for position in range(5):
        target = source.target(position)
        assert set(target["labels"].tolist()) == {int(digits[7]) + 1}
        assert target["area"].tolist() == target["masks"].sum((1, 2)).tolist()


# Scenes are functions of their number


def test_scenes_are_the_same_in_another_process() -> None:
    code = (
        "from tests.datamodules.test_digit_scenes import _data, _digest, _scenes;"
        "print(_digest(_scenes(_data(split_seed=7))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == _digest(_scenes(_data()))


def test_scene_does_not_depend_on_what_was_asked_for_before() -> None:
    one, other = _source("val"), pickle.loads(pickle.dumps(_source("val")))
    forward = [_bytes(one, i) for i in range(10)]
    backward = [_bytes(other, i) for i in reversed(range(10))]
    np.random.seed(1)
    assert forward == backward[::-1] == [_bytes(one, i) for i in range(10)]


def _bytes(source: SceneSource, position: int) -> tuple[bytes, list[float]]:
    return source.image(position).tobytes(), source.target(position)["boxes"].flatten().tolist()


def test_larger_split_begins_with_the_smaller_one() -> None:
    assert _digest(_scenes(_data())[:10]) == _digest(_scenes(_data(train_size=10)))


def test_splits_are_different_scenes_of_different_digits() -> None:
    used: dict[str, set[bytes]] = {}
    first = set()
    for split in ("train", "val", "test"):
        source = _source(split)
        glyphs: npt.NDArray[np.uint8] = source._glyphs
        used[split] = {glyph.tobytes() for glyph in glyphs}
        first.add(source.image(0).tobytes())
        assert len(source.labels) == SIZES[f"{split}_size"]
        assert set(source._digits.tolist()) == set(range(10))
    assert len(first) == 3
    assert used["train"].isdisjoint(used["val"] | used["test"])
    assert used["val"].isdisjoint(used["test"])


def test_masks_are_given_only_on_request_and_change_nothing_else() -> None:
    plain = _scenes(_data(masks=False))
    assert set(plain[0][1]) == {"boxes", "labels"}
    assert _digest(plain) == _digest(_scenes(_data()))


def test_digits_are_not_mirrored_by_default() -> None:
    data = _data()
    assert data.augment == "none"
    assert _digest(_scenes(data)) == _digest(samples_of(data.train_dataloader()))


# The contract


def test_every_loader_gives_batches(no_network: None) -> None:
    data = _data()
    data.prepare_data()
    data.setup()
    assert len(next(iter(data.train_dataloader()))[0]) == 4
    for loader in (data.val_dataloader(), data.test_dataloader()):
        index = torch.cat([index for _, _, index in loader])
        assert index.tolist() == list(range(20))
    assert data.sample_name(3) == "test/3"
    assert (data.image_id(3), data.category_ids, data.class_names[0]) == (4, list(range(1, 11)), "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 63}, "image_size must be a whole number of 64 or more, got 63"),
        ({"train_size": 0}, "train_size must be a whole number of 1 or more"),
        ({"test_size": 1.5}, "test_size must be a whole number of 1 or more"),
        ({"val_split": 0.1}, "val_split must be 0 beside the scenes for validation"),
    ],
)
def test_impossible_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitScenesDataModule(**options)


def test_command_line_shows_every_argument() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DigitScenesDataModule, "data")
    defaults = parser.get_defaults().data.as_dict()
    assert set(defaults) == set(DigitScenesDataModule().hparams)
    assert defaults["augment"] == "none"
