import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

from dia_lightning.callbacks import PredictionGrid, prediction_grid
from dia_lightning.callbacks._step_outputs import StepOutputs, read_step_outputs
from dia_lightning.drawing import Prediction, draw_predictions
from tests.callbacks.tiny_classifier import NAMES, TinyData, TinyTask, tiny_trainer


class Oracle(TinyTask):
    """Knows the classes of TinyData, and takes the samples in `wrong` for the next class, surer the later they come."""

    def __init__(self, wrong: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.wrong = wrong

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        images, index = batch
        labels = images.flatten(1)[:, :63].reshape(-1, 3, 21).mean(2).argmax(1)
        is_wrong = torch.tensor([int(i) in self.wrong for i in index])
        confidence = torch.where(is_wrong, 0.5 + index / 100, torch.full(index.shape, 0.9))
        probabilities = ((1 - confidence) / 2)[:, None].repeat(1, 3)
        said = (labels + is_wrong.long()) % 3
        return {"index": index, "probabilities": probabilities.scatter(1, said[:, None], confidence[:, None])}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Prediction], list[str], str]]:
    """Everything that is drawn in the test, in order."""
    calls: list[tuple[list[Prediction], list[str], str]] = []

    def record(predictions: list[Prediction], names: list[str], title: str) -> Image.Image:
        calls.append((list(predictions), list(names), title))
        return draw_predictions(predictions, names, title)

    monkeypatch.setattr(prediction_grid, "draw_predictions", record)
    return calls


Drawn = list[tuple[list[Prediction], list[str], str]]


def fit(
    folder: Path, grid: PredictionGrid, data: TinyData | None = None, task: LightningModule | None = None
) -> Trainer:
    trainer = tiny_trainer(folder, grid, max_epochs=4, num_sanity_val_steps=2)
    trainer.fit(task or TinyTask(), datamodule=data or TinyData())
    return trainer


def test_validation_shows_the_same_images_each_epoch_spread_over_the_set(tmp_path: Path, drawn: Drawn) -> None:
    fit(tmp_path, PredictionGrid(num_images=6))
    assert [[prediction.sample for prediction in call[0]] for call in drawn] == [[0, 4, 8, 12, 16, 20]] * 4


def test_more_images_than_batches_take_several_of_each(tmp_path: Path, drawn: Drawn) -> None:
    fit(tmp_path, PredictionGrid(num_images=12))
    assert [prediction.sample for prediction in drawn[0][0]] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]


def test_a_small_set_is_shown_whole(tmp_path: Path, drawn: Drawn) -> None:
    fit(tmp_path, PredictionGrid(num_images=16), TinyData(samples=5, batch_size=5))
    assert [prediction.sample for prediction in drawn[0][0]] == [0, 1, 2, 3, 4]


def test_only_every_nth_epoch_is_drawn_and_sanity_checking_is_not(tmp_path: Path, drawn: Drawn) -> None:
    fit(tmp_path, PredictionGrid(every_n_epochs=2))
    folder = tmp_path / "pictures" / "val" / "predictions"
    assert sorted(file.name for file in folder.iterdir()) == ["step=000012.png", "step=000024.png"]
    assert [call[2].split(",")[0] for call in drawn] == ["val: epoch 1", "val: epoch 3"]


@pytest.mark.parametrize(("stage", "reads"), [("validate", 2), ("test", 6)])
def test_no_batch_is_read_from_the_device_twice_or_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, reads: int
) -> None:
    calls = []

    def read(outputs: Any) -> StepOutputs:
        calls.append(outputs["index"].tolist())
        return read_step_outputs(outputs)

    monkeypatch.setattr(prediction_grid, "read_step_outputs", read)
    trainer = tiny_trainer(tmp_path, PredictionGrid(num_images=2))
    getattr(trainer, stage)(TinyTask(), datamodule=TinyData(), verbose=False)
    assert len(calls) == reads
    assert len({index[0] for index in calls}) == reads


def test_images_are_denormalised_and_labelled(tmp_path: Path, drawn: Drawn) -> None:
    data = TinyData()
    tiny_trainer(tmp_path, PredictionGrid(num_images=24)).validate(Oracle(wrong=(3,)), datamodule=data, verbose=False)
    ((predictions, names, title),) = drawn
    assert names == NAMES
    assert title == "val: 23 of 24 right"
    for prediction in predictions:
        torch.testing.assert_close(prediction.image, (data.images[prediction.sample] + 1) / 2)
        assert prediction.true == data.labels[prediction.sample]
        assert prediction.is_right == (prediction.sample != 3)
        assert prediction.confidence == pytest.approx(0.53 if prediction.sample == 3 else 0.9)


def test_without_a_datamodule_images_are_stretched_and_classes_numbered(tmp_path: Path, drawn: Drawn) -> None:
    tiny_trainer(tmp_path, PredictionGrid()).validate(TinyTask(), TinyData().val_dataloader(), verbose=False)
    predictions, names, _ = drawn[0]
    assert names == ["0", "1", "2"]
    assert all(float(prediction.image.min()) == 0 and float(prediction.image.max()) == 1 for prediction in predictions)


def test_padding_samples_are_not_shown(tmp_path: Path, drawn: Drawn) -> None:
    tiny_trainer(tmp_path, PredictionGrid(num_images=24)).test(
        TinyTask(), datamodule=TinyData(padding=2), verbose=False
    )
    assert sorted(prediction.sample for prediction in drawn[0][0]) == list(range(22))


def test_half_of_a_test_picture_are_the_most_confident_mistakes(tmp_path: Path, drawn: Drawn) -> None:
    task = Oracle(wrong=(1, 9, 14, 17, 23))
    tiny_trainer(tmp_path, PredictionGrid(num_images=6)).test(task, datamodule=TinyData(), verbose=False)
    ((predictions, _, title),) = drawn
    assert [prediction.sample for prediction in predictions] == [0, 8, 16, 23, 17, 14]
    assert title == "test: 3 of 3 right, then the most confident mistakes"


def test_a_test_without_mistakes_shows_a_full_picture(tmp_path: Path, drawn: Drawn) -> None:
    tiny_trainer(tmp_path, PredictionGrid(num_images=6)).test(Oracle(), datamodule=TinyData(), verbose=False)
    assert [prediction.sample for prediction in drawn[0][0]] == [0, 4, 8, 12, 16, 20]


def test_the_callback_does_not_change_training(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [PredictionGrid()]):
        torch.manual_seed(0)
        task = TinyTask()
        tiny_trainer(tmp_path, *callbacks, max_epochs=2).fit(task, datamodule=TinyData())
        weights.append(task.state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_the_callback_can_be_copied_and_pickled() -> None:
    grid = PredictionGrid(num_images=9)
    assert copy.deepcopy(grid).num_images == pickle.loads(pickle.dumps(grid)).num_images == 9


class Forgetful(TinyTask):
    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": torch.zeros(())}


def test_a_step_without_probabilities_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, PredictionGrid())
    with pytest.raises(ValueError, match=r"The step must return .* but returned \['loss'\]"):
        trainer.validate(Forgetful(), datamodule=TinyData(), verbose=False)


def test_class_names_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, PredictionGrid())
    with pytest.raises(ValueError, match=r"TinyData.class_names has 3 names, but the model has 4 classes"):
        trainer.validate(TinyTask(num_classes=4), datamodule=TinyData(), verbose=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_images": 0}, "num_images must be from 1 to 100, got 0"), ({"every_n_epochs": 0}, "every_n_epochs must be")],
)
def test_impossible_arguments_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictionGrid(**arguments)
