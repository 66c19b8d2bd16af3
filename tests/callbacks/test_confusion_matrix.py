import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import LightningModule
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dia_lightning.callbacks import ConfusionMatrix
from dia_lightning.callbacks._class_names import short_label
from dia_lightning.callbacks._pictures import _render
from dia_lightning.callbacks.confusion_matrix import draw_class_accuracy, draw_confusion_matrix
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer

COUNTS = np.array([[8, 2, 0], [0, 5, 0], [1, 0, 199]])


def counts_of(classes: int) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = 9 * np.eye(classes, dtype=np.int64) + np.eye(classes, k=1, dtype=np.int64)
    return counts


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def tick_labels_of(figure: Figure, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def assert_labels_do_not_overlap(figure: Figure) -> None:
    image = _render(figure)
    for axis in "xy":
        boxes = [label.get_window_extent() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]
        assert all(not first.overlaps(second) for first, second in pairwise(boxes))
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= image.width for box in boxes)


def test_both_pictures_are_written_at_the_end_of_test(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, ConfusionMatrix()).test(TinyTask(), datamodule=TinyData(), verbose=False)
    for name in ("confusion_matrix", "class_accuracy"):
        with Image.open(tmp_path / "pictures" / "test" / name / "step=000000.png") as image:
            assert min(image.size) > 150
            assert len(np.unique(np.asarray(image))) > 20


def test_fit_draws_no_confusion_matrix(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, ConfusionMatrix()).fit(TinyTask(), datamodule=TinyData())
    assert not (tmp_path / "pictures").exists()


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
    image = _render(figure)
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


class TaskWithoutCounts(LightningModule):
    pass


def test_a_task_without_confusion_metric_is_refused_before_training(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="TaskWithoutCounts has no metric named 'confusion'"):
        ConfusionMatrix().setup(trainer, TaskWithoutCounts(), "fit")


def test_the_callback_can_be_pickled() -> None:
    assert isinstance(pickle.loads(pickle.dumps(ConfusionMatrix())), ConfusionMatrix)


def test_a_long_label_keeps_both_ends() -> None:
    assert short_label("n02093428 American Staffordshire terrier", 20) == "n02093428 Am… terrier"[:12] + "…" + "terrier"
    assert len(short_label("x" * 100, 20)) == 20
