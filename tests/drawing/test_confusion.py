from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dia_lightning.drawing import as_image, draw_class_accuracy, draw_confusion_matrix
from dia_lightning.drawing._letters import short_label

COUNTS = np.array([[8, 2, 0], [0, 5, 0], [1, 0, 199]])


def counts_of(classes: int) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = 9 * np.eye(classes, dtype=np.int64) + np.eye(classes, k=1, dtype=np.int64)
    return counts


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def tick_labels_of(figure: Figure, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def assert_labels_do_not_overlap(figure: Figure) -> None:
    image = as_image(figure)
    for axis in "xy":
        boxes = [label.get_window_extent() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]
        assert all(not first.overlaps(second) for first, second in pairwise(boxes))
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= image.width for box in boxes)


def test_cells_name_share_of_the_true_class_and_count() -> None:
    figure = draw_confusion_matrix(COUNTS, ["cat", "dog", "owl"])
    assert texts_of(figure) == ["80%\n8", "20%\n2", "100%\n5", "<1%\n1", "100%\n199"]
    assert figure.axes[0].get_title() == "accuracy 98.60% of 215 samples"
    np.testing.assert_allclose(np.asarray(figure.axes[0].images[0].get_array()), COUNTS / COUNTS.sum(1, keepdims=True))


def test_a_class_without_samples_leaves_its_row_empty() -> None:
    figure = draw_confusion_matrix(np.array([[3, 0], [0, 0]]), ["cat", "dog"])
    assert texts_of(figure) == ["100%\n3"]


@pytest.mark.parametrize(("classes", "named", "texts"), [(20, 20, 39), (21, 21, 0), (100, 100, 0)])
def test_every_class_up_to_100_is_named_without_overlap(classes: int, named: int, texts: int) -> None:
    names = [f"Quite_long_name_of_class_{i}" for i in range(classes)]
    figure = draw_confusion_matrix(counts_of(classes), names)
    assert len(tick_labels_of(figure, "x")) == len(tick_labels_of(figure, "y")) == named
    assert len(texts_of(figure)) == texts
    assert_labels_do_not_overlap(figure)


def test_a_thousand_classes_are_numbered_in_steps() -> None:
    figure = draw_confusion_matrix(counts_of(1000), [str(i) for i in range(1000)])
    image = as_image(figure)
    assert 3 < len(tick_labels_of(figure, "x")) < 20
    assert max(image.size) < 1500


def test_accuracy_is_drawn_for_every_class_that_has_samples() -> None:
    figure = draw_class_accuracy(np.array([[8, 2, 0], [0, 0, 0], [1, 0, 3]]), ["cat", "dog", "owl"])
    assert tick_labels_of(figure, "y") == ["cat", "owl"]
    assert texts_of(figure) == ["80.0% of 10", "75.0% of 4"]
    assert figure.axes[0].get_title() == "accuracy per class (dashed: mean of the classes, 77.50%)"
    assert_labels_do_not_overlap(figure)


def test_of_many_classes_the_worst_are_drawn() -> None:
    right = np.arange(100, 0, -1)
    counts = np.diag(right)
    counts[:, 0] += 100 - right
    figure = draw_class_accuracy(counts, [f"class {i}" for i in range(100)])
    assert tick_labels_of(figure, "y") == [f"class {i}" for i in range(99, 69, -1)]
    assert "30 worst of 100 classes" in figure.axes[0].get_title()
    assert_labels_do_not_overlap(figure)


def test_a_long_label_keeps_both_ends() -> None:
    assert short_label("n02093428 American Staffordshire terrier", 20) == "n02093428 Am… terrier"[:12] + "…" + "terrier"
    assert len(short_label("x" * 100, 20)) == 20
