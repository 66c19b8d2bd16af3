"""The callback `MapCorrelation`, against a recorder over the same images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from dia_lightning.analysis import MapRecorder, map_correlation, mean_correlation
from dia_lightning.attention import watch_maps
from dia_lightning.callbacks import EMA, MapCorrelation
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer
from tests.two_processes import on_two_processes

NAMES = ["map_correlation", *(f"map_correlation_stage{stage}" for stage in range(3))]


def task(cls: type[ClassificationTask] = ClassificationTask, **options: Any) -> ClassificationTask:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"attention": "se", "share": "block", "attention_args": {"reduction": 2}, **options}
    made = cls("cifar_resnet", 10, backbone_args={"depth": 14, "block": "basic"}, **arguments)
    for name, parameter in made.named_parameters():
        if ".dia." in name:  # else maps hardly differ from image to image
            torch.nn.init.normal_(parameter)
    return made


def digits(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(image_size=8, batch_size=16, limit=65, **options)


def expected(model: ClassificationTask, protocol: Any = "per-image", split: Any = "val") -> dict[str, float]:
    model.eval()
    with MapRecorder(model) as recorder, torch.no_grad():
        for images, _, _ in digits().evaluation_dataloader(split):
            model(images)
    stages = map_correlation(recorder.stages, protocol)
    return dict(zip(NAMES, [mean_correlation(stages), *(stage.mean for stage in stages)], strict=True))


def check(found: Any, wanted: dict[str, float], prefix: str = "val") -> None:
    for name, value in wanted.items():
        assert float(found[f"{prefix}/{name}"]) == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("protocol", ["per-image", "pooled", "centred"])
def test_validation_logs_what_a_recorder_finds(tmp_path: Path, protocol: Any) -> None:
    model, callback = task(), MapCorrelation(protocol=protocol)
    (found,) = tiny_trainer(tmp_path, callback).validate(model, digits(), verbose=False)
    check(found, expected(model, protocol))
    with Image.open(tmp_path / "pictures" / "val" / "correlation_of_maps" / "step=000000.png") as picture:
        assert picture.width > picture.height > 200


def test_the_test_has_numbers_of_its_own(tmp_path: Path) -> None:
    model = task()
    (found,) = tiny_trainer(tmp_path, MapCorrelation()).test(model, digits(), verbose=False)
    check(found, expected(model, split="test"), "test")
    assert (tmp_path / "pictures" / "test" / "correlation_of_maps" / "step=000000.png").exists()


class KeepOutputs(Callback):
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.kept.append(outputs["probabilities"].clone())


def test_training_and_outputs_are_bit_equal_with_and_without(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [MapCorrelation()]):
        outputs, model = KeepOutputs(), task()
        trainer = tiny_trainer(tmp_path, outputs, *callbacks, max_epochs=2)  # with a sanity check
        torch.manual_seed(1)
        trainer.fit(model, digits())
        results.append([*outputs.kept, *model.state_dict().values()])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_seen_where_they_are_validated(tmp_path: Path, first: bool) -> None:
    model, callbacks = task(), [EMA(decay=0.9), MapCorrelation()]
    trainer = tiny_trainer(tmp_path, *(callbacks if first else callbacks[::-1]))
    trainer.fit(model, digits())  # which leaves the average in the model
    check(trainer.callback_metrics, expected(model))


class RunsTheNetwork(Callback):
    """As callbacks that sample or draw do."""

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module(torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize("first", [True, False])
def test_only_validation_steps_count(tmp_path: Path, first: bool) -> None:
    model, callbacks = task(), [MapCorrelation(), RunsTheNetwork()]
    trainer = tiny_trainer(tmp_path, *(callbacks if first else callbacks[::-1]))
    (found,) = trainer.validate(model, digits(), verbose=False)
    check(found, expected(model))


class RunsTwice(ClassificationTask):
    """As a detector does that also logs the losses of validation: of images that are no padding, then of all."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self(batch[0][:-1])
        result = super().validation_step(batch, batch_idx)
        self(batch[0].flip(0))
        return result


def test_every_image_of_a_step_counts_once(tmp_path: Path) -> None:
    model = task(cls=RunsTwice)
    (found,) = tiny_trainer(tmp_path, MapCorrelation()).validate(model, digits(), verbose=False)
    check(found, expected(model))


def test_a_network_without_attention_trains_and_warns(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, MapCorrelation())
    with pytest.warns(UserWarning, match="MapCorrelation logs nothing, because the network has no attention"):
        trainer.fit(TinyTask(), datamodule=TinyData())
    assert "val/map_correlation" not in trainer.callback_metrics


class Interrupt(Callback):
    def on_validation_batch_start(self, *_: Any) -> None:
        raise RuntimeError("interrupted")


def test_an_interrupted_validation_leaves_the_network_alone(tmp_path: Path) -> None:
    model = task()
    with pytest.raises(RuntimeError, match="interrupted"):
        tiny_trainer(tmp_path, MapCorrelation(), Interrupt()).validate(model, digits(), verbose=False)
    with watch_maps(model, lambda *_: None):  # refuses a network that is watched
        pass


def test_stages_of_one_layer_have_no_number(tmp_path: Path) -> None:
    (found,) = tiny_trainer(tmp_path, MapCorrelation()).validate(task(plug="11|10|01"), digits(), verbose=False)
    assert found["val/map_correlation"] == pytest.approx(found["val/map_correlation_stage0"])
    assert "val/map_correlation_stage1" not in found


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    # 65 images: one process gets 33, the other 32 and one image that only fills up
    model = task()
    trainer = tiny_trainer(tmp_path, MapCorrelation(protocol="centred"), **on_two_processes())
    (found,) = trainer.validate(model, digits(), verbose=False)
    check(found, expected(model, "centred"))
    assert (tmp_path / "pictures" / "val" / "correlation_of_maps" / "step=000000.png").exists()


def test_mistakes_are_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="protocol must be one of per-image, pooled, centred, got 'mean'"):
        MapCorrelation(protocol="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replicates must be 0 or more, got -1"):
        MapCorrelation(replicates=-1)
    with pytest.raises(ValueError, match="There are several MapCorrelation callbacks"):
        tiny_trainer(tmp_path, MapCorrelation(), MapCorrelation(protocol="centred")).fit(task(), digits())
