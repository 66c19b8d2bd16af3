import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dia_lightning.callbacks import DetectionGrid, detection_grid
from dia_lightning.callbacks._step_outputs import detected_objects
from dia_lightning.drawing import ObjectClasses, Objects, Scene, draw_detections
from dia_lightning.drawing._boxes_and_masks import class_colour
from dia_lightning.drawing._detections import CELL
from tests.callbacks.tiny_classifier import tiny_trainer
from tests.callbacks.tiny_detector import NAMES, Detections, TinyDetector, TinyScenes, by_index, detections

CLASSES = ObjectClasses(NAMES, None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Scene], str]]:
    """The scenes and the title of every picture of the test, in order."""
    calls: list[tuple[list[Scene], str]] = []

    def record(scenes: list[Scene], classes: ObjectClasses, *, title: str, score_threshold: float) -> Image.Image:
        calls.append((list(scenes), title))
        return draw_detections(scenes, classes, title=title, score_threshold=score_threshold)

    monkeypatch.setattr(detection_grid, "draw_detections", record)
    return calls


Drawn = list[tuple[list[Scene], str]]


def run_test(folder: Path, grid: DetectionGrid, data: TinyScenes, task: TinyDetector | None = None) -> NDArray[Any]:
    tiny_trainer(folder, grid).test(task or TinyDetector(), datamodule=data, verbose=False)
    with Image.open(folder / "pictures" / "test" / "detections" / "step=000000.png") as picture:
        return np.asarray(picture).astype(int)


def pixels_of(picture: NDArray[Any], colour: tuple[int, ...]) -> int:
    return int((np.abs(picture - colour).max(2) == 0).sum())


def halves(picture: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The ground truth and the prediction, without title and legend."""
    middle, body = picture.shape[1] // 2, picture[110:]
    return body[:, :middle], body[:, middle:]


def test_every_validation_shows_the_same_images_spread_over_the_set(tmp_path: Path, drawn: Drawn) -> None:
    trainer = tiny_trainer(tmp_path, DetectionGrid(num_images=3), max_epochs=4)
    trainer.fit(TinyDetector(), datamodule=TinyScenes(12))
    assert [[scene.sample for scene in call[0]] for call in drawn] == [[0, 4, 8]] * 4
    assert [call[1] for call in drawn] == [f"val: epoch {i}, detections above 0.5" for i in range(4)]
    assert len(list((tmp_path / "pictures" / "val" / "detections").iterdir())) == 4


@pytest.mark.parametrize(("samples", "batch_size"), [(6, 4), (7, 5), (13, 4)])
def test_a_small_last_batch_costs_no_image(tmp_path: Path, drawn: Drawn, samples: int, batch_size: int) -> None:
    run_test(tmp_path, DetectionGrid(num_images=6), TinyScenes(samples, batch_size=batch_size))
    shown = [scene.sample for scene in drawn[0][0]]
    assert len(set(shown)) == 6
    assert shown == sorted(shown)


def test_only_every_nth_epoch_is_drawn(tmp_path: Path, drawn: Drawn) -> None:
    trainer = tiny_trainer(tmp_path, DetectionGrid(every_n_epochs=2), max_epochs=4)
    trainer.fit(TinyDetector(), datamodule=TinyScenes())
    assert [call[1].split(",")[0] for call in drawn] == ["val: epoch 1", "val: epoch 3"]


def test_image_truth_and_sure_detections_belong_to_one_sample(tmp_path: Path, drawn: Drawn) -> None:
    data = TinyScenes(7, padding=1)
    run_test(tmp_path, DetectionGrid(num_images=7), data)
    ((scenes, title),) = drawn
    assert title == "test: detections above 0.5"
    assert [scene.sample for scene in scenes] == [0, 1, 2, 3, 4, 5]  # the padding sample is left out
    for scene in scenes:
        torch.testing.assert_close(scene.image, data.images[scene.sample])
        torch.testing.assert_close(scene.true.boxes, by_index(scene.sample)["boxes"])
        torch.testing.assert_close(scene.found.boxes, by_index(scene.sample)["boxes"][:1])


@pytest.mark.parametrize("samples", [1, 6])
def test_the_picture_has_a_row_of_two_per_image(tmp_path: Path, samples: int) -> None:
    picture = run_test(tmp_path, DetectionGrid(), TinyScenes(samples))
    rows = sum(min(CELL[1], round(CELL[0] * (24 + 2 * i) / (40 + 4 * (i % 2)))) for i in range(samples))
    assert rows < picture.shape[0] < rows + 60 * samples + 150
    assert picture.shape[1] <= 2 * CELL[0] + 60


@pytest.mark.parametrize("size", [(128, 128), (800, 1333), (1333, 800), (1, 1), (16, 900)])
def test_images_of_any_size_are_shown_as_large_as_there_is_room_for(size: tuple[int, int]) -> None:
    nothing = Objects(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0))
    scene = Scene(torch.full((3, *size), 0.25), nothing, nothing, 0)
    picture = np.asarray(draw_detections([scene], CLASSES, title="test", score_threshold=0.5)).astype(int)
    scale = min(CELL[0] / size[1], CELL[1] / size[0])
    shown = 2 * max(1, round(size[0] * scale)) * max(1, round(size[1] * scale))
    assert abs(pixels_of(picture, (64, 64, 64)) - shown) <= 0.01 * shown


def test_the_left_half_follows_the_truth_and_the_right_half_the_detections(tmp_path: Path) -> None:
    def cat(index: int) -> Detections:
        return detections((5, 5, 20, 20, 1, 0.9))

    def owl(index: int) -> Detections:
        return detections((5, 5, 20, 20, 3, 0.9))

    truth, found = halves(run_test(tmp_path, DetectionGrid(), TinyScenes(1, truth=cat), TinyDetector(owl)))
    assert pixels_of(truth, class_colour(1)) > 200 < pixels_of(found, class_colour(3))
    assert pixels_of(truth, class_colour(3)) == 0 == pixels_of(found, class_colour(1))


def test_other_detections_change_the_right_half_alone(tmp_path: Path) -> None:
    first, second = (
        halves(
            run_test(tmp_path / str(x), DetectionGrid(), TinyScenes(2), TinyDetector(lambda i, x=x: found_at(x)))  # type: ignore[misc]
        )
        for x in (3, 9)
    )
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1] != second[1]).sum() > 200


def found_at(x: float) -> Detections:
    return detections((x, 5, x + 10, 20, 2, 0.9))


def texts_of(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is written on the images and around them."""
    written: list[str] = []
    original = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: Any, words: str, **options: Any) -> None:
        written.append(words)
        original(self, place, words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    draw_detections([scene], CLASSES, title="val: epoch 3", score_threshold=0.5)
    return written


def test_counts_stand_below_the_images_and_a_legend_above(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = detected_objects(by_index(2), 0.5)
    scene = Scene(torch.zeros(3, 32, 32), detected_objects(by_index(2), 0.0), objects, 2)
    assert texts_of(scene, monkeypatch) == [
        *["owl 0.88", "dog, small 0.25"],  # on the left
        "owl 0.88",
        "val: epoch 3",
        *["dog, small", "owl"],
        *["ground truth", "prediction"],
        *["sample 2: 2 objects", "1 detection above 0.5"],
    ]


def test_an_image_without_objects_and_detections_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = detected_objects(detections((1, 1, 5, 5, 1, 0.4)), 0.5)
    scene = Scene(torch.zeros(3, 32, 32), nothing, nothing, 8)
    assert texts_of(scene, monkeypatch)[-2:] == ["sample 8: no object", "no detection above 0.5"]


def test_a_diverged_detector_does_not_end_the_training(tmp_path: Path, drawn: Drawn) -> None:
    nan, inf = float("nan"), float("inf")
    task = TinyDetector(lambda index: detections((1, 1, 5, 5, 1, nan), (nan, 1, 5, 5, 1, 0.9), (1, 1, inf, 5, 1, 0.9)))
    run_test(tmp_path, DetectionGrid(), TinyScenes(2), task)
    assert len(drawn) == 1


def test_masks_of_both_halves_are_shown(tmp_path: Path) -> None:
    def answer(index: int) -> Detections:
        return detections((5, 5, 35, 20, 1, 0.9), masks=(24, 40))

    data = TinyScenes(1, truth=answer)
    data.images = [torch.zeros(3, 24, 40)]
    tint = tuple(int(0.4 * part) for part in class_colour(1))
    for half in halves(run_test(tmp_path, DetectionGrid(), data, TinyDetector(answer))):
        assert pixels_of(half, tint) > 0.7 * 30 * 15 * (720 / 40) ** 2


def test_the_callback_does_not_change_training(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [DetectionGrid()]):
        torch.manual_seed(0)
        task = TinyDetector()
        torch.nn.init.constant_(task.weight, 1.0)
        tiny_trainer(tmp_path, *callbacks, max_epochs=2).fit(task, datamodule=TinyScenes())
        weights.append(task.weight.detach())
    assert weights[0] == weights[1] != 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 25}, "num_images must be from 1 to 24, got 25. 6 gives"),
        ({"every_n_epochs": 0}, "every_n_epochs must be"),
        ({"score_threshold": -0.1}, "score_threshold must be from 0 to 1, got -0.1"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionGrid(**arguments)


def test_the_callback_can_be_copied_and_pickled() -> None:
    grid = DetectionGrid(num_images=9)
    assert copy.deepcopy(grid).num_images == pickle.loads(pickle.dumps(grid)).num_images == 9
