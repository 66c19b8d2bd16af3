from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dia_lightning.drawing import ObjectClasses, Objects, draw_objects
from dia_lightning.drawing._boxes_and_masks import Rectangle, class_colour, text_colour
from dia_lightning.drawing._letters import font
from tests.drawing.conftest import Written

NAMES = ObjectClasses(["cat", "dog", "owl"], None)


def objects_at(*boxes: tuple[float, float, float, float], label: int = 1, scores: bool = True) -> Objects:
    return Objects(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.full((len(boxes),), label),
        torch.linspace(0.9, 0.5, len(boxes)) if scores else None,
    )


def array(picture: Image.Image) -> NDArray[np.int64]:
    return np.asarray(picture).astype(np.int64)


def grey(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 0.5)


def test_an_image_without_objects_stays_as_it_is() -> None:
    image = torch.rand(3, 20, 30)
    picture = array(draw_objects(image, objects_at(), NAMES))
    np.testing.assert_array_equal(picture, (image.permute(1, 2, 0) * 255).round().numpy())


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 0), (3.0, 0), (0.5, 1)])
def test_a_box_is_drawn_where_it_is(scale: float, tolerance: int) -> None:
    picture = array(draw_objects(grey(200, 300), objects_at((100, 80, 260, 160)), NAMES, scale=scale, text_size=11))
    rows, columns = np.nonzero((picture == class_colour(1)).all(2))
    place = (columns.min(), columns.max(), rows.max())
    np.testing.assert_allclose(place, [100 * scale, 260 * scale, 160 * scale], atol=tolerance)


def test_boxes_beyond_the_edge_are_drawn_at_the_edge_and_broken_ones_not_at_all() -> None:
    nan, inf = float("nan"), float("inf")
    broken = objects_at((nan, 0, 5, 5), (0, 0, inf, 5))
    assert (array(draw_objects(grey(50, 50), broken, NAMES)) == 128).all()
    beyond = array(draw_objects(grey(50, 50), objects_at((-20, -20, 90, 90), scores=False), NAMES))
    assert all((edge == class_colour(1)).all(-1).mean() > 0.5 for edge in (beyond[-1], beyond[:, 0], beyond[:, -1]))
    draw_objects(grey(50, 50), objects_at((30, 30, 10, 10), (60, 60, 70, 70)), NAMES)


def test_each_of_21_classes_has_a_colour_of_its_own_that_never_changes() -> None:
    colours = [class_colour(label) for label in range(1, 22)]
    assert min(np.abs(np.subtract(*pair)).max() for pair in combinations(colours, 2)) >= 25
    assert colours[:3] == [(213, 94, 0), (86, 180, 233), (0, 158, 115)]


def test_letters_stand_out_from_every_colour() -> None:
    for colour in (class_colour(label) for label in range(1, 22)):
        dark, light = sorted(_luminance(part) for part in (colour, text_colour(colour)))
        assert (light + 0.05) / (dark + 0.05) > 3.0  # what WCAG asks of large letters


def _luminance(colour: tuple[int, ...]) -> float:
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_a_detection_has_name_and_score_and_a_true_object_its_name(written: Written) -> None:
    draw_objects(grey(100, 200), objects_at((50, 50, 90, 90), label=2), NAMES)
    draw_objects(grey(100, 200), objects_at((50, 50, 90, 90), label=3, scores=False), NAMES)
    assert [text for text, _ in written] == ["dog 0.90", "owl"]


def test_a_crowd_is_called_one(written: Written) -> None:
    crowd = Objects(torch.tensor([[20.0, 20, 90, 90]]), torch.tensor([1]), crowd=torch.tensor([True]))
    draw_objects(grey(100, 200), crowd, NAMES)
    assert [text for text, _ in written] == ["cat (crowd)"]


def test_an_only_class_needs_no_name(written: Written) -> None:
    draw_objects(grey(100, 200), objects_at((50, 50, 90, 90)), ObjectClasses(["nucleus"], None))
    draw_objects(grey(100, 200), objects_at((50, 50, 90, 90), scores=False), ObjectClasses(["nucleus"], None))
    assert [text for text, _ in written] == ["0.90"]


@pytest.mark.parametrize(
    "box", [(0, 0, 30, 20), (170, 0, 200, 20), (0, 85, 30, 100), (0, 0, 200, 100), (198, 50, 200, 52)]
)
def test_labels_stay_within_the_picture(written: Written, box: tuple[float, float, float, float]) -> None:
    draw_objects(grey(100, 200), objects_at(box), ObjectClasses(["a rather long name", "x"], None))
    ((_, (left, top, right, bottom)),) = written
    assert 0 <= left < right <= 200
    assert 0 <= top < bottom <= 100


@pytest.mark.parametrize(
    ("width", "expected"), [(256, "american staff…e terrier 0.90"), (60, "am… 0.90"), (30, "0.90"), (20, None)]
)
def test_a_label_is_shortened_to_the_room_there_is(written: Written, width: int, expected: str | None) -> None:
    names = ObjectClasses(["american staffordshire terrier", "x"], None)
    draw_objects(grey(64, width), objects_at((4, 20, 15, 50)), names)
    assert [text for text, _ in written] == ([] if expected is None else [expected])


def test_labels_of_neighbours_do_not_cover_each_other(written: Written) -> None:
    boxes = [(100 + 6 * i, 100 + 5 * i, 180 + 6 * i, 160 + 5 * i) for i in range(4)]
    draw_objects(grey(300, 400), objects_at(*boxes), NAMES)
    assert len(written) == 4
    assert not any(Rectangle(*a).overlap(Rectangle(*b)) for (_, a), (_, b) in combinations(written, 2))


def test_the_best_detections_of_a_crowded_image_keep_their_labels(written: Written) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 150
    classes = torch.randint(1, 4, (60,), generator=generator)
    scores = torch.linspace(0.99, 0.4, 60)
    draw_objects(grey(200, 200), Objects(torch.cat([corners, corners + 25], 1), classes, scores), NAMES)
    assert 3 <= len(written) < 45
    assert written[0][0].endswith("0.99")
    assert {text.split()[0] for text, _ in written} == {"cat", "dog", "owl"}


def test_a_few_more_objects_make_smaller_labels(written: Written) -> None:
    heights = []
    for count in (20, 30):
        written.clear()
        boxes = [
            (40 + 100 * (i % 6), 40 + 100 * (i // 6), 90 + 100 * (i % 6), 90 + 100 * (i // 6)) for i in range(count)
        ]
        draw_objects(grey(600, 700), objects_at(*boxes), NAMES, text_size=20)
        assert len(written) == count
        heights.append(written[0][1][3] - written[0][1][1])
    assert heights[1] < heights[0]


def test_a_mask_tints_its_pixels_and_outlines_them() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 10:30, 12:28] = True
    objects = Objects(torch.tensor([[12.0, 10, 28, 30]]), torch.tensor([1]), masks=mask)
    picture = array(draw_objects(torch.zeros(3, 40, 40), objects, ObjectClasses(["only"], None)))
    inside, outline = picture[11:29, 13:27], picture[10, 12:28]
    assert (inside == [int(0.4 * part) for part in class_colour(1)]).all()
    assert (outline == class_colour(1)).all()
    assert (picture[:9] == 0).all()


def test_an_empty_mask_is_no_error() -> None:
    objects = Objects(torch.tensor([[2.0, 2, 8, 8]]), torch.tensor([1]), masks=torch.zeros(1, 20, 20, dtype=torch.bool))
    assert draw_objects(torch.zeros(3, 20, 20), objects, NAMES).size == (20, 20)


def test_better_detections_lie_on_top() -> None:
    boxes, scores = torch.tensor([[5.0, 5, 60, 60]] * 2), torch.tensor([0.9, 0.6])
    picture = array(draw_objects(grey(100, 100), Objects(boxes, torch.tensor([1, 2]), scores), NAMES))
    assert tuple(picture[60, 30]) == class_colour(1)


def test_pixels_that_are_no_numbers_are_black() -> None:
    assert (array(draw_objects(torch.full((3, 4, 4), float("nan")), objects_at(), NAMES)) == 0).all()


def test_the_font_knows_more_than_latin_letters() -> None:
    letters = font(20)
    unknown = letters.getmask("\U0010ffff").getbbox(), bytes(letters.getmask("\U0010ffff"))
    for letter in "äßéжλ":
        assert (letters.getmask(letter).getbbox(), bytes(letters.getmask(letter))) != unknown
