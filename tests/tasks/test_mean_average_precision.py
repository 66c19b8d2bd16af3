"""The metric against pycocotools itself."""

import contextlib
import io
from collections.abc import Sequence
from importlib import util
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask  # type: ignore[import-untyped]
from pycocotools.coco import COCO  # type: ignore[import-untyped]
from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]
from torch import Tensor

from dia_lightning.tasks import mean_average_precision
from dia_lightning.tasks.mean_average_precision import MeanAveragePrecision, Scores

SIZE = 160
NAMES = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
NAMES += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]

Item = dict[str, Tensor]


def random_images(count: int, *, seed: int, masks: bool = False, largest: int = 120) -> tuple[list[Item], list[Item]]:
    """Detections and targets: hits, doubles, wrong labels, crowds, equal scores; some images lack one or the other."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    found, true = [], []
    for number in range(count):
        objects = 0 if number % 5 == 1 else int(whole(1, 6, 1))
        boxes = _clipped(whole(0, SIZE - 20, objects, 2), whole(6, largest, objects, 2))
        labels = whole(1, 5, objects)
        target = {"boxes": boxes, "labels": labels, "iscrowd": (whole(0, 6, objects) == 0).long()}
        if masks:
            target["masks"] = _ellipses(boxes)
            target["area"] = target["masks"].flatten(1).sum(1).float()
        else:
            target["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(1) * 0.75  # of what is not a rectangle
        true.append(target)
        repeats = 0 if number % 5 == 2 else 3
        near = _clipped(
            boxes[:, :2].long().repeat(repeats, 1) + whole(-3, 4, repeats * objects, 2),
            (boxes[:, 2:] - boxes[:, :2]).long().repeat(repeats, 1) + whole(-3, 4, repeats * objects, 2),
        )
        far = _clipped(whole(0, SIZE - 20, 3, 2), whole(6, largest, 3, 2))
        guesses = torch.cat([near, far])
        kinds = torch.cat([labels.repeat(repeats), whole(1, 5, 3)])
        kinds = torch.where(whole(0, 8, len(kinds)) == 0, whole(1, 6, len(kinds)), kinds)  # 5 is never true
        scores = whole(1, 11, len(kinds)).float() / 10
        order = scores.argsort(descending=True, stable=True)
        detections = {"boxes": guesses[order], "labels": kinds[order], "scores": scores[order]}
        if masks:
            detections["masks"] = _ellipses(guesses[order])[:, None].float() * 0.8
        found.append(detections)
    return found, true


def _clipped(corners: Tensor, sides: Tensor) -> Tensor:
    start = corners.clamp(0, SIZE - 8)
    return torch.cat([start, (start + sides.clamp(min=4)).clamp(max=SIZE)], 1).float()


def _ellipses(boxes: Tensor) -> Tensor:
    """Return the masks [N, SIZE, SIZE] uint8 that fill boxes."""
    grid = torch.arange(SIZE) + 0.5
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    across = (grid[None] - centre[:, :1]) / half[:, :1]
    down = (grid[None] - centre[:, 1:]) / half[:, 1:]
    return (across[:, None, :] ** 2 + down[:, :, None] ** 2 <= 1).to(torch.uint8)


def reference(found: Sequence[Item], true: Sequence[Item], kind: str) -> tuple[list[float], dict[int, float]]:
    """COCO's twelve numbers, and the average precision of each class, by pycocotools alone."""
    dataset: dict[str, Any] = {
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(len(true))],
        "categories": [{"id": label} for label in range(1, 6)],
        "annotations": [
            {**annotation, "id": 1 + i}
            for i, annotation in enumerate(entry for j, item in enumerate(true) for entry in _entries(item, j))
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        results = [entry for j, item in enumerate(found) for entry in _entries(item, j)]
        for entry in results:
            del entry["bbox" if kind == "segm" else "segmentation"], entry["iscrowd"], entry["area"]
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    seen = {label: precision[:, :, label - 1] for label in range(1, 6)}
    return list(evaluation.stats), {label: float(part.mean()) for label, part in seen.items() if (part > -1).all()}


def _entries(item: Item, image: int) -> list[dict[str, Any]]:
    entries = []
    for i, (left, top, right, bottom) in enumerate(item["boxes"].tolist()):
        entry = {
            "image_id": image,
            "category_id": int(item["labels"][i]),
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": int(item["iscrowd"][i]) if "iscrowd" in item else 0,
            "area": float(item["area"][i]) if "area" in item else 0.0,
            "segmentation": None,
        }
        if "scores" in item:
            entry["score"] = float(item["scores"][i])
        if "masks" in item:
            filled = (item["masks"][i] > 0).reshape(SIZE, SIZE).to(torch.uint8).numpy()
            entry["segmentation"] = coco_mask.encode(np.asfortranarray(filled))
        entries.append(entry)
    return entries


def measure(found: Sequence[Item], true: Sequence[Item], index: Sequence[int] | None = None) -> Scores:
    metric = MeanAveragePrecision(masks="masks" in true[0])
    metric.add(found, true, torch.tensor(range(len(found)) if index is None else index))
    return metric.compute()


def assert_same(scores: Scores, stats: list[float], per_class: dict[int, float], prefix: str = "") -> None:
    assert {prefix + name for name, value in zip(NAMES, stats, strict=True) if value >= 0} == {
        name for name in scores.overall if name.startswith("mask_") == bool(prefix)
    }
    for name, value in zip(NAMES, stats, strict=True):
        if value >= 0:
            assert scores.overall[prefix + name] == pytest.approx(value, abs=1e-6), name
    if not prefix:
        assert scores.per_class == pytest.approx(per_class, abs=1e-6)


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations in turn."""
    monkeypatch.setattr(mean_average_precision, "coco_backend", lambda: request.param)
    return str(request.param)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_scored_as_pycocotools_scores_them(backend: str, seed: int) -> None:
    found, true = random_images(12, seed=seed)
    stats, per_class = reference(found, true, "bbox")
    assert 0.05 < stats[0] < 0.95
    assert_same(measure(found, true), stats, per_class)


def test_masks_are_scored_as_pycocotools_scores_them(backend: str) -> None:
    found, true = random_images(10, seed=0, masks=True)
    scores = measure(found, true)
    assert_same(scores, *reference(found, true, "bbox"))
    assert_same(scores, *reference(found, true, "segm"), prefix="mask_")


def test_what_no_object_defines_is_left_out(backend: str) -> None:
    found, true = random_images(8, seed=0, largest=31)  # nothing is medium or large
    stats, per_class = reference(found, true, "bbox")
    assert stats[5] == stats[11] == -1
    scores = measure(found, true)
    assert_same(scores, stats, per_class)
    assert "map_large" not in scores.overall
    nothing = [{name: values[:0] for name, values in target.items()} for target in true]
    assert measure(found, nothing) == Scores({}, {})


def test_nothing_found_scores_zero(backend: str) -> None:
    found, true = random_images(4, seed=0)
    scores = measure([{name: values[:0] for name, values in item.items()} for item in found], true)
    assert scores.overall["map"] == 0
    assert set(scores.per_class.values()) == {0.0}


def test_images_that_only_fill_up_a_batch_are_left_out_and_others_count_once() -> None:
    found, true = random_images(6, seed=3)
    once = measure(found[:4], true[:4])
    padded = measure([*found[:4], found[5], found[0]], [*true[:4], true[5], true[0]], [0, 1, 2, 3, -1, 0])
    assert padded == once
    assert padded != measure(found, true)


def test_the_order_in_which_images_come_does_not_matter() -> None:
    found, true = random_images(12, seed=1)  # with tied scores, which count in the order of images
    order = [7, 0, 11, 4, 2, 9, 1, 10, 3, 6, 8, 5]
    turned = measure([found[i] for i in order], [true[i] for i in order], order)
    assert turned == measure(found, true)


def test_an_epoch_begins_with_nothing() -> None:
    found, true = random_images(6, seed=1)
    metric = MeanAveragePrecision(masks=False)
    metric.add(found[3:], true[3:], torch.arange(3))
    metric.compute()
    metric.reset()
    metric.add(found[:3], true[:3], torch.arange(3))
    assert metric.compute() == measure(found[:3], true[:3])


@pytest.mark.parametrize("name", ["scores", "boxes"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    found, true = random_images(1, seed=0)
    found[0][name].view(-1)[0] = value
    with pytest.raises(ValueError, match=r"scores or boxes that are not finite for image 17: its weights"):
        measure(found, true, [17])


def test_a_missing_implementation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = util.find_spec
    missing = {"faster_coco_eval"}

    def without(name: str, *args: Any) -> Any:
        return None if name in missing else find(name, *args)

    monkeypatch.setattr("dia_lightning._coco_tools.find_spec", without)
    assert MeanAveragePrecision(masks=False)._coco_backend.backend == "pycocotools"
    with pytest.raises(ValueError, match="max_detections=150 needs faster-coco-eval"):
        MeanAveragePrecision(masks=False, max_detections=150)
    missing.add("pycocotools")
    with pytest.raises(ImportError, match=r'pip install "dia-lightning\[detection\]"'):
        MeanAveragePrecision(masks=False)
