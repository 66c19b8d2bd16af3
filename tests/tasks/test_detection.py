"""DetectionTask: losses, results, checkpoints, faults."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from dia_lightning.datamodules import DigitScenesDataModule
from dia_lightning.tasks import NonFiniteLossError, load_task
from dia_lightning.tasks.detection import DetectionTask
from tests.tasks.conftest import Given, small_trainer
from tests.tasks.tiny_detection import (
    assert_equal_detections,
    tiny_batch,
    tiny_task,
    training_batch,
)

RCNN_LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


class Answers(nn.Module):
    """A "detector" that gives the same answer for every image."""

    def __init__(self, **answer: Any) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.answer = {name: torch.tensor(values) for name, values in answer.items()}

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return [dict(self.answer) for _ in images]


def detections(task: DetectionTask) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return cast(list[dict[str, Tensor]], task.eval()(tiny_batch(2, 1, seed=5)[0]))


# ---- training


@pytest.mark.parametrize(
    ("detector", "terms"),
    [
        ("fasterrcnn", RCNN_LOSSES),
        ("maskrcnn", RCNN_LOSSES | {"loss_mask"}),
        ("retinanet", {"classification", "bbox_regression"}),
        ("fcos", {"classification", "bbox_regression", "bbox_ctrness"}),
    ],
)
def test_each_loss_is_logged_by_its_name_beside_their_sum(tmp_path: Path, detector: str, terms: set[str]) -> None:
    trainer = small_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(tiny_task(detector), Given([training_batch(2, 1, masks=True)]))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert set(logged) == {"train/loss", *(f"train/{name}" for name in terms)}
    assert logged["train/loss"] == pytest.approx(sum(logged[f"train/{name}"] for name in terms), rel=1e-6)
    assert all(value > 0 for name, value in logged.items())


@pytest.mark.parametrize("detector", ["fasterrcnn", "maskrcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_images_without_objects_train_every_weight(tmp_path: Path, detector: str, counts: tuple[int, ...]) -> None:
    task = tiny_task(detector)
    trainer = small_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(task, Given([training_batch(*counts, masks=True)]))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert [name for name, part in task.named_parameters() if part.grad is None] == []
    assert all(torch.isfinite(part).all() for part in task.parameters())


def test_a_loss_that_is_not_finite_stops_the_training_and_is_named(tmp_path: Path) -> None:
    good = training_batch(2, 1)
    bad = training_batch(2, 1)
    bad[0][0][:] = torch.nan
    task = tiny_task(detector_args={"rpn_nms_thresh": 1.0})
    with pytest.raises(NonFiniteLossError, match=r"nan \(from .*loss_objectness.*\) at batch 1 of epoch 0"):
        small_trainer(tmp_path, limit_val_batches=0).fit(task, Given([good, bad]))
    assert all(torch.isfinite(part).all() for part in task.parameters())


def spoilt(name: str, values: Any) -> Callable[[dict[str, Tensor]], None]:
    def spoil(target: dict[str, Tensor]) -> None:
        target[name] = torch.as_tensor(values, dtype=target[name].dtype)

    return spoil


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda target: cast(None, target.pop(name))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoilt("labels", [1, 0]), r"^Label 0 in image 1 of the batch \(image_id 42\): labels must be 1 to 3 \(num_cl"),
        (spoilt("labels", [4, 1]), r"^Label 4 in image 1 of the batch \(image_id 42\): labels must be 1 to 3"),
        (spoilt("boxes", [[1, 1, 9, 9], [1, 1, torch.nan, 9]]), r"^Box \[1.0, 1.0, nan, 9.0\] in image 1 .*42\)"),
        (spoilt("boxes", [[1, 1, 9, torch.inf], [1, 1, 9, 9]]), r"^Box \[1.0, 1.0, 9.0, inf\] in image 1 .*42\)"),
        (
            spoilt("boxes", [[1, 1, 9, 9], [5, 1, 5, 9]]),
            r"^Box \[5.0, 1.0, 5.0, 9.0\] in image 1 .*x1 < x2 and y1 < y2",
        ),
        (spoilt("boxes", [[1, 1, 9, 9], [1, 9, 5, 1]]), r"^Box \[1.0, 9.0, 5.0, 1.0\] in image 1"),
        (spoilt("boxes", [[1, 1, 9, 9]]), r"^The target of image 1 .*42\) has 1 boxes and 2 labels, but each box"),
        (spoilt("labels", [1]), r"^The target of image 1 .*42\) has 2 boxes and 1 labels"),
        (without("labels"), r"^The target of image 1 .*42\) has no labels\."),
        (without("boxes"), r"^The target of image 1 .*42\) has no boxes\."),
    ],
)
def test_a_target_that_does_not_fit_is_refused_with_its_image(
    spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    images, targets = training_batch(1, 2)
    targets[1]["image_id"] = torch.tensor(42)
    spoil(targets[1])
    with pytest.raises(ValueError, match=message):
        tiny_task().train().losses(images, targets)


def test_masks_that_are_missing_or_too_few_are_refused() -> None:
    task = tiny_task("maskrcnn").train()
    with pytest.raises(ValueError, match=r"image 0 of the batch has no masks\. Set masks=True in the data module"):
        task.losses(*training_batch(1, 2))
    images, targets = training_batch(1, 2, masks=True)
    targets[1]["masks"] = targets[1]["masks"][:1]
    with pytest.raises(ValueError, match="image 1 of the batch has 2 boxes and 1 masks"):
        task.losses(images, targets)


def test_a_batch_needs_one_target_per_image() -> None:
    images, targets = training_batch(1, 2)
    with pytest.raises(ValueError, match="The batch has 2 images and 1 targets"):
        tiny_task().train().losses(images, targets[:1])


# ---- validation


def validation_losses(task: DetectionTask, batch: Any, folder: Path) -> dict[str, float]:
    torch.manual_seed(7)  # of the samplers
    (logged,) = small_trainer(folder).validate(task, Given([batch]), verbose=False)
    return {name: value for name, value in logged.items() if "loss" in name or "classification" in name}


@pytest.mark.parametrize("detector", ["fasterrcnn", "maskrcnn", "fcos"])
def test_losses_of_the_validation_are_those_of_torchvision_with_norms_at_rest(tmp_path: Path, detector: str) -> None:
    task = tiny_task(detector, validation_loss=True)
    batch = tiny_batch(2, 1, masks=True)
    reference = copy.deepcopy(task.detector).train()
    for module in reference.modules():
        if isinstance(module, _NormBase):
            module.eval()
    torch.manual_seed(7)
    with torch.no_grad():
        expected = reference(*training_batch(2, 1, masks=True))
    state = {name: value.clone() for name, value in task.state_dict().items()}
    (logged,) = small_trainer(tmp_path).validate(_seeded(task), Given([batch]), verbose=False)
    for name, value in expected.items():
        assert logged[f"val/{name}"] == pytest.approx(float(value), rel=1e-6), name
    assert logged["val/loss"] == pytest.approx(sum(map(float, expected.values())), rel=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())


def _seeded(task: DetectionTask) -> DetectionTask:
    torch.manual_seed(7)
    return task


def test_logging_losses_of_the_validation_changes_nothing_else(tmp_path: Path) -> None:
    batch = tiny_batch(2, 1)
    results, weights = [], []
    for validation_loss in (False, True):
        task = tiny_task(validation_loss=validation_loss)
        trainer = small_trainer(tmp_path, max_epochs=2)
        trainer.fit(task, Given([batch]))
        results.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        weights.append({name: value.clone() for name, value in task.state_dict().items()})
    plain, logged = results
    assert {name for name in logged if name not in plain} == {"val/loss", *(f"val/{name}" for name in RCNN_LOSSES)}
    assert {name: logged[name] for name in plain} == plain
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_modes_are_those_of_evaluation_after_the_losses() -> None:
    task = tiny_task(backbone="torchvision/mobilenet_v3_small", backbone_args=None).eval()
    before = detections(task)
    with torch.no_grad():
        task._losses_in_evaluation(*tiny_batch(2, 1)[:2])
    assert not any(module.training for module in task.modules())
    assert_equal_detections(detections(task), before)


def test_random_depth_and_sizes_do_not_reach_the_losses_of_the_validation() -> None:
    torch.manual_seed(0)
    options = {"min_size": (48, 56, 64), "max_size": 96, "fpn_channels": 16, "representation_size": 32}
    options["rpn_batch_size_per_image"] = options["box_batch_size_per_image"] = 10**6  # nothing is left to chance
    task = DetectionTask(
        "fasterrcnn",
        "torchvision/convnext_tiny",
        3,
        backbone_args={"stochastic_depth_prob": 0.5, "layer_scale": 1.0},
        detector_args=options,
    ).eval()
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            terms = task._losses_in_evaluation(*tiny_batch(2, 1, seed=3)[:2])
        losses.append({name: float(value) for name, value in terms.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_crowds_are_left_out_of_the_losses_of_the_validation(tmp_path: Path) -> None:
    images, targets, index = tiny_batch(2, 1)
    crowded = copy.deepcopy(targets)
    for name, values in targets[0].items():
        more = torch.tensor([[0.0, 0.0, 60.0, 60.0]]) if name == "boxes" else torch.ones(1).to(values)
        crowded[0][name] = torch.cat([values, more])
    assert crowded[0]["iscrowd"].tolist() == [0, 0, 1]
    found = [
        validation_losses(tiny_task(validation_loss=True), (images, those, index), tmp_path)
        for those in (targets, crowded)
    ]
    assert found[0] == found[1]


def test_images_that_fill_up_a_batch_count_in_no_result(tmp_path: Path) -> None:
    images, targets, index = tiny_batch(2, 1, 3)
    trainer = small_trainer(tmp_path)
    results = []
    for batches in (
        [(images[:2], targets[:2], index[:2])],
        [(images, targets, torch.tensor([0, 1, -1])), (images[2:], targets[2:], torch.tensor([-1]))],
    ):
        results.append(trainer.validate(_seeded(tiny_task(validation_loss=True)), Given(batches), verbose=False))
        torch.manual_seed(7)
    assert results[0] == results[1]
    assert results[0][0]["val/loss"] > 0


def test_scores_are_logged_by_the_name_of_the_class(tmp_path: Path) -> None:
    images, targets, index = tiny_batch(1, 1)
    for target in targets:
        target["boxes"], target["labels"] = torch.tensor([[4.0, 4.0, 24.0, 24.0]]), torch.tensor([2])
    targets[0]["labels"][:] = 3
    data = Given([(images, targets, index)])
    data.class_names = ["disc", "square/flat", "bar"]  # type: ignore[attr-defined]
    task = DetectionTask(Answers(boxes=[[4.0, 4.0, 24.0, 24.0]], labels=[2], scores=[0.9]), num_classes=3)
    (result,) = small_trainer(tmp_path).test(task, data, verbose=False)
    assert result["test/ap/square_flat"] == pytest.approx(0.5, abs=0.01)  # of two equal scores the first is wrong
    assert result["test/ap/bar"] == 0
    assert not any("disc" in name for name in result)  # there is none
    assert not any(value < 0 for value in result.values())
    assert "test/map_large" not in result
    assert result["test/map_small"] == result["test/map"] == pytest.approx(0.25, abs=0.01)


def test_scores_are_logged_by_number_where_no_names_are_known(tmp_path: Path) -> None:
    task = DetectionTask(Answers(boxes=[[4.0, 4.0, 24.0, 24.0]], labels=[2], scores=[0.9]), num_classes=3)
    images, targets, index = tiny_batch(1)
    targets[0]["labels"][:] = 2
    (result,) = small_trainer(tmp_path).test(task, Given([(images, targets, index)]), verbose=False)
    assert "test/ap/2" in result


def test_validation_without_objects_warns_and_goes_on(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val/map", mode="max", save_last=True)
    trainer = small_trainer(tmp_path, callbacks=[checkpoint])
    with pytest.warns(UserWarning, match=r"The val images have no object, so mAP is not defined and val/map is NaN"):
        trainer.fit(tiny_task(), Given([tiny_batch(0, 0)]))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert list(logged) == ["val/map"]
    assert math.isnan(logged["val/map"])
    assert checkpoint.best_model_score == -math.inf
    assert (tmp_path / "last.ckpt").is_file()


def test_the_background_is_not_detected() -> None:
    boxes = [[0.0, 0.0, 9.0, 9.0], [1.0, 1.0, 9.0, 9.0], [2.0, 2.0, 9.0, 9.0]]
    task = DetectionTask(Answers(boxes=boxes, labels=[1, 0, 2], scores=[0.9, 0.8, 0.7]), num_classes=2)
    (found,) = task([torch.rand(3, 16, 16)])
    assert found["labels"].tolist() == [1, 2]
    assert found["boxes"].tolist() == [boxes[0], boxes[2]]


def test_predicting_numbers_images_and_leaves_targets_of_foreign_loaders_alone(tmp_path: Path) -> None:
    images, targets, index = tiny_batch(1, 2, 1)
    task, trainer = tiny_task(), small_trainer(tmp_path)

    def predict(*batches: Any) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], trainer.predict(task, Given(list(batches))))

    for batches in ([images[:2], images[2:]], [(images[:2], targets[:2]), (images[2:], targets[2:])]):
        outputs = predict(*batches)
        assert [output["index"].tolist() for output in outputs] == [[0, 1], [2]]
        with torch.no_grad():
            expected = [*task.eval()(images[:2]), *task(images[2:])]
        assert_equal_detections([one for output in outputs for one in output["detections"]], expected)
    data = Given([(images, index + 5)])
    data.sample_name = str  # type: ignore[attr-defined]
    (output,) = cast(list[dict[str, Any]], trainer.predict(task, data))
    assert output["index"].tolist() == [5, 6, 7]


# ---- attention


def test_the_plain_task_is_the_detector_of_torchvision() -> None:
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 96}
    task = DetectionTask("fasterrcnn", "torchvision/resnet50", 3, detector_args=options)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, **options)
    theirs.load_state_dict({name.removeprefix("detector."): value for name, value in task.state_dict().items()})
    results = []
    for train in (task.train().losses, theirs.train()):
        torch.manual_seed(1)
        results.append(train(*training_batch(2, 1)))
    assert results[0] == results[1]
    images = tiny_batch(1, 2)[0]
    with torch.no_grad():
        assert_equal_detections(task.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("detector", ["fasterrcnn", "maskrcnn", "retinanet", "fcos"])
def test_attention_that_starts_as_identity_detects_what_the_plain_network_detects(
    tmp_path: Path, detector: str
) -> None:
    plain = tiny_task(detector, attention=None)
    torch.save(plain.detector.state_dict(), tmp_path / "plain.pth")
    attached = tiny_task(detector, seed=1, identity=True, init_from=str(tmp_path / "plain.pth"))
    assert_equal_detections(detections(attached), detections(plain))
    other = tiny_task(detector, seed=1, init_from=str(tmp_path / "plain.pth"))
    with pytest.raises(AssertionError):
        assert_equal_detections(detections(other), detections(plain))


# ---- checkpoints


@pytest.mark.parametrize("detector", ["fasterrcnn", "maskrcnn"])
def test_a_checkpoint_loads_safely_and_detects_the_same(tmp_path: Path, detector: str) -> None:
    task = tiny_task(detector, trainable_layers=2, frozen_norm=True, attention_args={"reduction": 8})
    data = Given([tiny_batch(2, 1, masks=True)])
    data.class_names, data.category_ids = ["disc", "square", "bar"], [3, 7, 20]  # type: ignore[attr-defined]
    small_trainer(tmp_path, limit_val_batches=0).fit(task, data)
    for restored in (
        DetectionTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True),
        load_task(tmp_path / "last.ckpt"),
    ):
        assert isinstance(restored, DetectionTask)
        assert_equal_detections(detections(restored), detections(task))
        assert (restored.class_names, restored.category_ids) == (["disc", "square", "bar"], [3, 7, 20])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["dia_task"] == "DetectionTask"
    assert "init_from" not in stored["hyper_parameters"]
    assert stored["hyper_parameters"]["trainable_layers"] == 2


class Losses(Callback):
    """Notes the loss of every step; the samplers get the same random numbers in the same step of every run."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    batches = [training_batch(2, 1, seed=seed) for seed in range(2)]
    whole, first, second = Losses(), Losses(), Losses()

    def fit(folder: Path, epochs: int, losses: Losses, checkpoint: Path | None = None) -> None:
        trainer = small_trainer(folder, max_epochs=epochs, limit_val_batches=0)
        trainer.callbacks.insert(0, losses)  # type: ignore[attr-defined]
        task = tiny_task(seed=3, warmup_steps=3)
        trainer.fit(task, Given(batches), ckpt_path=checkpoint, weights_only=True)

    fit(tmp_path / "whole", 2, whole)
    fit(tmp_path / "parts", 1, first)
    fit(tmp_path / "rest", 2, second, tmp_path / "parts" / "last.ckpt")
    assert first.seen + second.seen == whole.seen
    assert len(set(whole.seen)) == 4


# ---- the data module of digits


def test_instance_segmentation_trains_and_is_scored(tmp_path: Path) -> None:
    data = DigitScenesDataModule(image_size=64, train_size=4, val_size=1, test_size=2, masks=True, batch_size=2)
    task = tiny_task("maskrcnn", num_classes=10)
    trainer = small_trainer(tmp_path)
    trainer.fit(task, data)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["train/loss_mask"])
    (result,) = trainer.test(task, data, verbose=False)
    assert {"test/map", "test/mask_map", "test/mask_mar_100"} <= set(result)
    assert all(0 <= value <= 1 for value in result.values())
    assert task.class_names == [str(digit) for digit in range(10)]


# ---- detectors as objects


def own_detector() -> FasterRCNN:
    torch.manual_seed(0)
    layers = {f"layer{stage}": str(stage) for stage in range(1, 5)}
    backbone = BackboneWithFPN(
        resnet18(), layers, [64, 128, 256, 512], 16
    )  # few channels, for the boxes' head is large
    return FasterRCNN(backbone, 4, min_size=64, max_size=96, box_detections_per_img=10)


def test_a_detector_object_trains_with_attention_and_must_be_passed_again(tmp_path: Path) -> None:
    task = DetectionTask(own_detector(), num_classes=3, attention="dia-lstm", lr=1e-3)
    small_trainer(tmp_path, limit_val_batches=0).fit(task, Given([training_batch(2, 1)]))
    assert [name for name, part in task.named_parameters() if part.requires_grad and part.grad is None] == []
    with pytest.raises(ValueError, match=r"an object as detector \(FasterRCNN\).*detector=\.\.\."):
        DetectionTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    restored = DetectionTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, detector=own_detector())
    assert_equal_detections(detections(restored), detections(task))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "cifar_resnet"}, "backbone: only for a named detector; this one is an object"),
        ({"backbone_args": {"depth": 8}}, "backbone_args: only for a named detector"),
        ({"detector_args": {"min_size": 64}}, "min_size: only for a named detector"),
        ({"trainable_layers": 0}, "trainable_layers: only for a named detector"),
        ({"frozen_norm": True}, "frozen_norm: only for a named detector"),
    ],
)
def test_options_of_a_named_detector_are_refused_beside_an_object(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionTask(Answers(), num_classes=3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": None}, "num_classes must be 1 or more, without the background, got None"),
        ({"num_classes": 0}, "num_classes must be 1 or more, without the background, got 0"),
        ({"backbone": None}, "backbone must be a name or a network, got None"),
        ({"backbone": nn.Linear(1, 1)}, "backbone_args are for a named backbone"),
        ({"attention": "dia_lstm"}, "Did you mean 'dia-lstm'"),
        ({"detector_args": {"min_sizes": 64}}, "fasterrcnn does not take 'min_sizes'"),
        (
            {"detector_args": {"num_classes": 4}},
            "detector_args must not have num_classes: give it as num_classes of the task",
        ),
        ({"detector_args": {"frozen_norm": True}}, "detector_args must not have frozen_norm"),
        ({"trainable_layers": 9}, "trainable_layers must be 0"),
        ({"max_detections": 99}, "max_detections must be 100, as in COCO, or more, got 99"),
        ({"lr": -1.0}, "lr must be a positive number, got -1.0"),
    ],
)
def test_a_wrong_option_is_refused_when_the_task_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_task(**options)
