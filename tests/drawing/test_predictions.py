import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dia_lightning.drawing import Prediction, draw_predictions
from dia_lightning.drawing._boxes_and_masks import Rectangle
from dia_lightning.drawing._predictions import CELL, RIGHT, WRONG
from tests.drawing.conftest import Written


def predictions_of(image: Tensor, right: bool, name_index: int = 0, count: int = 1) -> list[Prediction]:
    return [Prediction(image, name_index if right else 1 - name_index, name_index, 0.5, i, 2) for i in range(count)]


def coloured_pixels(image: Image.Image, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(np.asarray(image).astype(int) - wanted).max(2) < 8).sum())


@pytest.mark.parametrize(("right", "colour", "other"), [(True, RIGHT, WRONG), (False, WRONG, RIGHT)])
def test_right_titles_are_green_and_wrong_ones_red(right: bool, colour: str, other: str) -> None:
    image = draw_predictions(predictions_of(torch.zeros(1, 8, 8), right), ["cat", "dog"], "test")
    assert coloured_pixels(image, colour) > 20
    assert coloured_pixels(image, other) == 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 48, 224), (5, 16, 16), (1, 1, 1)])
def test_images_of_any_shape_fill_their_cells(shape: tuple[int, ...]) -> None:
    image = draw_predictions(predictions_of(torch.full(shape, 0.25), True, count=4), ["cat", "dog"], "test")
    pixel = np.asarray(image).astype(int)
    grey = np.abs(pixel - 64).max(2) <= 1
    width = min(1.0, shape[2] / shape[1]) * min(1.0, shape[1] / shape[2])
    assert grey.sum() > 0.7 * 4 * 190 * 190 * width


def test_the_widest_names_stay_within_their_cells(written: Written) -> None:
    picture = draw_predictions(predictions_of(torch.zeros(1, 8, 8), True, count=4), ["W" * 40, "M" * 40], "test")
    _, *boxes = (Rectangle(*place) for _, place in written)
    assert len(boxes) == 8
    assert all(box.right - box.left <= CELL for box in boxes)
    assert not any(first.overlap(second) for i, first in enumerate(boxes) for second in boxes[:i])
    assert all(box.left >= 0 and box.right <= picture.width for box in boxes)


def test_dollar_signs_and_line_breaks_are_drawn_as_they_stand(written: Written) -> None:
    draw_predictions(predictions_of(torch.zeros(1, 8, 8), False), ["$5 and $6\nbills_{", "dog"], "test")
    assert [text for text, _ in written] == ["test", "$5 and $6 bills_{ (50%)", "true: dog"]
