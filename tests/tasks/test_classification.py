"""ClassificationTask: metrics, checkpoints, resume, faults."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask, NonFiniteLossError
from tests.tasks.conftest import Given, Rates, small_task, small_trainer
from tests.tasks.tiny_training import tiny_task


class Scores(nn.Module):
    """A "network" whose images are its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) + self.unused


def scores(labels: list[int], classes: int) -> Tensor:
    """Images [B, K, 1, 1] that a Scores network reads as confident votes for these labels."""
    return 10.0 * nn.functional.one_hot(torch.tensor(labels), classes).float()[:, :, None, None]


def test_headline_accuracy_is_micro_and_macro_is_named_as_such(tmp_path: Path) -> None:
    # Class 0: five of five right; class 1: none of one. Micro 5/6, macro 1/2.
    batch = (scores([0, 0, 0, 0, 0, 0], 3), torch.tensor([0, 0, 0, 0, 0, 1]))
    task = ClassificationTask(Scores(), 3)
    (result,) = small_trainer(tmp_path).test(task, Given([batch]), verbose=False)
    assert result["test/acc"] == pytest.approx(5 / 6)
    assert result["test/acc_macro"] == pytest.approx(0.5)
    assert "test/acc5" not in result
    assert task.confusion is not None
    assert task.confusion.compute().tolist() == [[5, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_top_five_counts_a_label_among_the_five_highest(tmp_path: Path) -> None:
    images = torch.arange(7.0).expand(2, 7)[:, :, None, None]  # class 6 scores highest, class 0 lowest
    batch = (images, torch.tensor([2, 1]))
    (result,) = small_trainer(tmp_path).validate(ClassificationTask(Scores(), 7), Given([batch]), verbose=False)
    assert result["val/acc5"] == pytest.approx(0.5)


def test_metrics_do_not_depend_on_what_the_first_batch_holds(tmp_path: Path) -> None:
    # All of the first batch is right, so that all metrics count the same there; of the second none is right, class 1
    # twice among the first five. Class 0: 4 of 4, class 1: 0 of 2, class 6: 0 of 1.
    falling = torch.arange(7.0, 0.0, -1.0).expand(3, 7)[:, :, None, None]
    first = (scores([0, 0, 0, 0], 7), torch.tensor([0, 0, 0, 0]))
    second = (falling, torch.tensor([1, 1, 6]))
    (result,) = small_trainer(tmp_path).test(ClassificationTask(Scores(), 7), Given([first, second]), verbose=False)
    assert result["test/acc"] == pytest.approx(4 / 7)
    assert result["test/acc5"] == pytest.approx(6 / 7)
    assert result["test/acc_macro"] == pytest.approx(1 / 3)


def test_images_that_fill_up_a_distributed_batch_are_not_counted(tmp_path: Path) -> None:
    real = (scores([0, 1, 2], 3), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
    padding = (scores([0, 1], 3), torch.tensor([2, 2]), torch.tensor([-1, -1]))
    trainer = small_trainer(tmp_path)
    alone = trainer.test(ClassificationTask(Scores(), 3), Given([real]), verbose=False)
    padded = trainer.test(ClassificationTask(Scores(), 3), Given([real, padding]), verbose=False)
    assert padded == alone
    assert alone[0]["test/acc"] == pytest.approx(2 / 3)


def test_a_partial_last_batch_weighs_as_much_as_its_images(tmp_path: Path) -> None:
    batches = [(scores([0] * 8, 3), torch.tensor([0] * 8)), (scores([0], 3), torch.tensor([1]))]
    (result,) = small_trainer(tmp_path).validate(ClassificationTask(Scores(), 3), Given(batches), verbose=False)
    assert result["val/acc"] == pytest.approx(8 / 9)
    right, wrong = -torch.log_softmax(torch.tensor([10.0, 0.0, 0.0]), 0)[:2]
    assert result["val/loss"] == pytest.approx(float((8 * right + wrong) / 9), rel=1e-5)


def test_soft_labels_and_a_batch_of_one_train(tmp_path: Path) -> None:
    batch = (torch.randn(1, 3, 16, 16), torch.tensor([[0.5, 0.5, 0.0]]))
    task = small_task(num_classes=3)
    small_trainer(tmp_path, limit_val_batches=0).fit(task, Given([batch, batch]))
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_the_control_arm_is_the_same_network_without_attention() -> None:
    plain = small_task(attention=None)
    attached = small_task()
    assert {key for key in attached.state_dict() if ".dia." not in key} == set(plain.state_dict())


def test_dropout_does_not_change_where_attention_goes_in_a_network_of_ones_own() -> None:
    assert list(tiny_task(attention="se", dropout=0.1).state_dict()) == list(tiny_task(attention="se").state_dict())


def test_dropout_of_the_classifier_comes_back_from_a_checkpoint(tmp_path: Path, digits: DigitsDataModule) -> None:
    task = small_task(dropout=0.5)
    assert list(task.state_dict()) == list(small_task().state_dict())
    small_trainer(tmp_path).fit(task, digits)
    restored: Any = ClassificationTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert restored.backbone.fc.dropout == 0.5
    images = torch.randn(4, 3, 8, 8)
    assert not torch.equal(restored.backbone.fc(torch.ones(1, 256)), restored.backbone.fc(torch.ones(1, 256)))
    assert torch.equal(restored.eval()(images), task.eval()(images))


# ---- checkpoints


def test_a_checkpoint_loads_safely_and_computes_the_same(tmp_path: Path, digits: DigitsDataModule) -> None:
    task = small_task(attention_args={"reduction": 8}, milestones=[3], schedule="step", init_from=None)
    trainer = small_trainer(tmp_path)
    trainer.fit(task, digits)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["dia_data"]["class_names"] == digits.class_names
    assert checkpoint["dia_data"]["mean"] == list(digits.mean)
    restored = ClassificationTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(restored(images), task.eval()(images))
    assert restored.class_names == digits.class_names


def test_a_backbone_object_must_be_passed_again(tmp_path: Path, digits: DigitsDataModule) -> None:
    from dia_lightning.models import get_model

    task = small_task(backbone=get_model("cifar_resnet", depth=11, num_classes=10), backbone_args=None)
    trainer = small_trainer(tmp_path)
    trainer.fit(task, digits)
    with pytest.raises(ValueError, match=r"an object as backbone \(CifarNetwork\).*backbone=\.\.\."):
        ClassificationTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    restored = ClassificationTask.load_from_checkpoint(
        tmp_path / "last.ckpt",
        weights_only=True,
        backbone=get_model("cifar_resnet", depth=11, num_classes=10),
    )
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(restored.eval()(images), task.eval()(images))


def test_data_with_other_classes_than_the_checkpoint_is_refused(tmp_path: Path, digits: DigitsDataModule) -> None:
    task = small_task()
    small_trainer(tmp_path).fit(task, digits)

    class Renamed(DigitsDataModule):
        @property
        def class_names(self) -> list[str]:
            return [f"digit {digit}" for digit in range(10)]

    with pytest.raises(ValueError, match=r"class_names \[0, 1, .*digit 0.*Labels would be mixed up"):
        small_trainer(tmp_path).test(
            task, Renamed(image_size=8, limit=65), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


@pytest.mark.parametrize(
    "schedule", [{"schedule": "step", "milestones": [2, 3]}, {"schedule": "cosine", "warmup_epochs": 1}]
)
def test_resuming_continues_epochs_and_learning_rate(
    tmp_path: Path, digits: DigitsDataModule, schedule: dict[str, Any]
) -> None:
    whole = Rates()
    small_trainer(tmp_path / "whole", max_epochs=4, callbacks=[whole]).fit(small_task(**schedule), digits)

    class Interrupt(Callback):
        def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    first, second = Rates(), Rates()
    trainer = small_trainer(tmp_path, max_epochs=4)
    trainer.callbacks = [first, *trainer.callbacks, Interrupt()]  # type: ignore[attr-defined]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(small_task(**schedule), digits)
    resumed = small_trainer(tmp_path, max_epochs=4, callbacks=[second])
    resumed.fit(small_task(**schedule), digits, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.seen + second.seen == whole.seen


# ---- faults


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    good = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    bad = (torch.full((4, 3, 8, 8), torch.nan), good[1])
    task = small_task(num_classes=3)
    with pytest.raises(NonFiniteLossError, match=r"nan at batch 2 of epoch 0; the last finite loss was \d"):
        small_trainer(tmp_path, limit_val_batches=0).fit(task, Given([good, good, bad]))
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": None}, "num_classes must be 2 or more, got None"),
        ({"num_classes": 1}, "num_classes must be 2 or more, got 1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"lr": -0.1}, "lr must be a positive number, got -0.1"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or a positive number, got -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"optimizer": "adam"}, "optimizer must be 'sgd', 'adamw' or a callable, got 'adam'"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov=True needs optimizer='sgd'"),
        ({"schedule": "exponential"}, "schedule must be 'step', 'cosine', 'constant' or a callable, got 'exponential'"),
        ({"schedule": "cosine", "milestones": None}, r"milestones must be a list, got null. Write \[\] for none"),
        ({"schedule": "cosine", "milestones": [3]}, "milestones are for schedule='step'"),
        ({"schedule": "step"}, "schedule='step' needs milestones"),
        ({"backbone_args": {"num_classes": 7}}, "backbone_args must not have num_classes"),
        (
            {"schedule": "step", "milestones": [5, 3]},
            r"milestones must be increasing epochs of at least 1, got \[5, 3\]",
        ),
        ({"schedule": "step", "milestones": [2], "warmup_epochs": 2}, "end before the first milestone, got 2"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"backbone": "cifar_resnt"}, "cifar_resnet"),
        ({"attention": "dia_lstm"}, "Did you mean 'dia-lstm'"),
        ({"attention_args": {"reductoin": 4}}, "Its arguments are: reduction, cells"),
    ],
)
def test_a_wrong_option_is_refused_when_the_task_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_task(**options)


def test_optimizer_and_schedule_can_be_injected(tmp_path: Path, digits: DigitsDataModule) -> None:
    task = small_task(
        optimizer=lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
        schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    rates = Rates()
    small_trainer(tmp_path, max_epochs=2, callbacks=[rates]).fit(task, digits)
    assert [rate for _, rate in rates.seen] == pytest.approx([0.01, 0.01, 0.005, 0.005])


def test_the_learning_rate_that_a_tuner_sets_is_used(tmp_path: Path, digits: DigitsDataModule) -> None:
    task = small_task()
    task.lr = 0.123
    rates = Rates()
    small_trainer(tmp_path, callbacks=[rates]).fit(task, digits)
    assert {rate for _, rate in rates.seen} == {0.123}


def test_a_compiled_task_keeps_the_names_of_its_weights() -> None:
    assert list(small_task(compile=True).state_dict()) == list(small_task().state_dict())


def test_predicting_plain_images_numbers_them_in_order(tmp_path: Path) -> None:
    images = scores([0, 2], 3)
    outputs = small_trainer(tmp_path).predict(ClassificationTask(Scores(), 3), Given([images, images]))
    first, second = cast(list[dict[str, Tensor]], outputs)
    assert (first["index"].tolist(), second["index"].tolist()) == ([0, 1], [2, 3])
    assert first["probabilities"].argmax(1).tolist() == [0, 2]


def test_labels_of_a_foreign_loader_are_not_taken_for_positions(tmp_path: Path) -> None:
    batches = [(scores([0, 2], 3), torch.tensor([7, 7])), (scores([1], 3), torch.tensor([7]))]
    task, trainer = ClassificationTask(Scores(), 3), small_trainer(tmp_path)
    for _ in range(2):  # counting starts anew
        outputs = cast(list[dict[str, Tensor]], trainer.predict(task, Given(batches)))
        assert [output["index"].tolist() for output in outputs] == [[0, 1], [2]]


def test_numbers_of_numpy_do_not_spoil_a_checkpoint(tmp_path: Path, digits: DigitsDataModule) -> None:
    small_trainer(tmp_path).fit(small_task(lr=np.float64(0.01), milestones=[np.int64(3)], schedule="step"), digits)
    hparams = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert (hparams["lr"], hparams["milestones"], hparams["num_classes"]) == (0.01, [3], 10)


def test_branches_and_sites_reach_the_network() -> None:
    task = small_task(sites=["layer2.*.bn3"])
    assert {key.partition(".dia.")[0] for key in task.backbone.state_dict() if ".dia." in key} == {"layer2.0"}
    with pytest.raises(ValueError, match="branches and sites exclude each other"):
        small_task(sites=["layer2.*.bn3"], branches=["conv"])


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return features + torch.relu(self.conv(features))


def own_backbone() -> nn.Module:
    """A network that takes grey images of 8x8 pixels only."""
    blocks = (OwnBlock(), OwnBlock())
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(4 * 8 * 8, 10))


def test_a_backbone_of_the_users_takes_attention_by_the_shape_of_the_images() -> None:
    task = ClassificationTask(own_backbone(), 10, attention="dia-lstm", image_shape=[1, 8, 8])
    assert {key.partition(".dia.")[0] for key in task.backbone.state_dict() if ".dia." in key} == {"1"}
    assert task(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="does not run on the example"):
        ClassificationTask(own_backbone(), 10, attention="dia-lstm")


def test_attention_of_the_networks_own_is_shared_and_comes_back(tmp_path: Path, digits: DigitsDataModule) -> None:
    task = ClassificationTask("timm/legacy_seresnet18", 10, existing="share")
    trainer = small_trainer(tmp_path)
    trainer.fit(task, digits)
    trainer.save_checkpoint(tmp_path / "shared.ckpt")
    loaded = ClassificationTask.load_from_checkpoint(tmp_path / "shared.ckpt", weights_only=True)
    assert loaded.hparams["existing"] == "share"
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.eval()(images), task.eval()(images))
    assert sum(".dia.module." in key for key in loaded.state_dict()) == 4 * 4  # two layers with bias per stage


def test_resuming_for_longer_than_the_schedule_lasts_is_said(tmp_path: Path, digits: DigitsDataModule) -> None:
    options = {"schedule": "cosine", "warmup_epochs": 1}
    small_trainer(tmp_path, max_epochs=2).fit(small_task(**options), digits)
    with pytest.warns(UserWarning, match=r"schedule of the checkpoint ends at epoch 2, but trainer\.max_epochs is 3"):
        small_trainer(tmp_path / "more", max_epochs=3).fit(
            small_task(**options), digits, ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
