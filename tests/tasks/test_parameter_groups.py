"""Which parameters have which rate and weight decay, and which are not trained at all."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from dia_lightning.attention import attention_parameters
from dia_lightning.models import get_model
from dia_lightning.tasks import ClassificationTask, DetectionTask, DiffusionTask
from dia_lightning.tasks._layers import head_of, layers
from tests.tasks.tiny_training import Network, fit, tiny_task
from tests.two_processes import on_two_processes


def names(module: nn.Module, parameters: Any) -> list[str]:
    known = {parameter: name for name, parameter in module.named_parameters()}
    return [known[parameter] for parameter in parameters]


def states(task: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.backbone.state_dict().items()}


def moved(task: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in states(task).items() if not torch.equal(value, before[name])}


# ---- layers and heads


def test_a_layer_is_a_block_or_what_stands_outside_of_blocks() -> None:
    network = Network()
    found = [names(network, layer) for layer in layers(network)]
    block = ["conv.weight", "bn.weight", "bn.bias"]
    assert found == [
        ["stem.weight", "stem.bias", "norm.weight", "norm.bias"],
        [f"blocks.0.{name}" for name in block],
        [f"blocks.1.{name}" for name in block],
        ["head.weight", "head.bias"],
    ]


@pytest.mark.parametrize(
    ("name", "count", "head"),
    [
        ("torchvision/resnet18", 1 + 8 + 1, "fc"),
        ("torchvision/vit_b_16", 1 + 12 + 1, "heads.head"),
        ("torchvision/mobilenet_v3_small", 1 + 11 + 1 + 2, "classifier.3"),
        ("torchvision/convnext_tiny", 1 + 18 + 3 + 1, "classifier.2"),
        ("torchvision/swin_t", 1 + 12 + 3 + 1, "head"),
        ("torchvision/googlenet", 3 + 9 + 1, "fc"),
        ("timm/convnext_atto", 1 + 12 + 3 + 1, "head.fc"),
    ],
)
def test_layers_and_heads_of_known_networks(name: str, count: int, head: str) -> None:
    with torch.device("meta"):
        network = get_model(name)
    found = layers(network)
    assert len(found) == count
    assert {parameter for layer in found for parameter in layer} == set(network.parameters())
    assert names(network, head_of(network)) == [f"{head}.weight", f"{head}.bias"]


# ---- groups


def groups_of(task: Any, **training: Any) -> dict[str, tuple[float, float, list[str]]]:
    """Return rate, weight decay and names of each group after a training."""
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                found[group.get("name", "")] = (
                    group["lr"],
                    group["weight_decay"],
                    [name.removeprefix("backbone.") for name in names(pl_module, group["params"])],
                )

    fit(task, callbacks=[Look()], max_steps=1, **training)
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", partial(SGD, lr=0.05, weight_decay=1e-4)])
def test_attention_and_norms_have_groups(optimizer: Any) -> None:
    task = tiny_task(attention="se", attention_lr=0.1, norm_weight_decay=False, optimizer=optimizer)
    found = groups_of(task)
    assert {name: group[:2] for name, group in found.items()} == {
        "main": (0.05, 1e-4),
        "main/no_decay": (0.05, 0.0),
        "attention": (pytest.approx(0.005), 1e-4),
        "attention/no_decay": (pytest.approx(0.005), 0.0),
    }
    assert found["main"][2] == ["stem.weight", "blocks.0.conv.weight", "blocks.1.conv.weight", "head.weight"]
    in_attention = found["attention"][2] + found["attention/no_decay"][2]
    assert sorted(in_attention) == sorted(names(task.backbone, attention_parameters(task)))
    assert all(name.startswith("blocks.0.dia.") for name in in_attention)
    everything = [name for *_, inside in found.values() for name in inside]
    assert sorted(everything) == sorted(name for name, _ in task.backbone.named_parameters())


def test_rates_fall_from_the_head_to_the_stem_but_not_for_shared_attention() -> None:
    found = groups_of(tiny_task(attention="se", layer_decay=0.5))
    assert {name: rate for name, (rate, *_) in found.items()} == {
        "layer_0": 0.05 / 8,
        "layer_1": 0.05 / 4,
        "layer_2": 0.05 / 2,
        "layer_3": 0.05,
        "attention": 0.05,
    }
    assert found["layer_1"][2] == ["blocks.0.conv.weight", "blocks.0.bn.weight", "blocks.0.bn.bias"]


class Sharded(ClassificationTask):
    """Its parameters are flat when the optimizer is made, as those of ``FullyShardedDataParallel``."""

    def configure_model(self) -> None:
        for parameter in self.parameters():
            parameter.data = parameter.data.flatten()


def test_groups_are_those_of_the_parameters_before_they_are_sharded() -> None:
    options: dict[str, Any] = {"attention": "se", "attention_lr": 0.1, "layer_decay": 0.5, "norm_weight_decay": False}
    found = []
    for kind in (ClassificationTask, Sharded):
        task = kind(Network(), 3, image_shape=[1, 4, 4], **options)
        fit(task, max_epochs=0)
        groups = task.trainer.optimizers[0].param_groups
        found.append({group["name"]: (group["lr"], names(task, group["params"])) for group in groups})
    assert found[0] == found[1]
    assert len(found[0]) == 2 * (4 + 1)


def test_without_options_there_is_one_group_without_a_name() -> None:
    assert list(groups_of(tiny_task(attention="se"))) == [""]


def test_the_monitor_of_rates_shows_groups_by_name(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    task = tiny_task(attention="se", attention_lr=0.1)
    fit(task, callbacks=[LearningRateMonitor()], logger=logger, log_every_n_steps=1, max_epochs=1)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr-SGD/main", "lr-SGD/attention"} <= set(header)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_lr": -1}, "attention_lr must be 0 or a positive factor of lr, got -1"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
        ({"freeze": "backbone"}, r"freeze must be a list of patterns such as \['backbone.layer1'\]"),
        (
            {"freeze": ["layer9"]},
            "freeze has the pattern 'layer9', which matches no parameter. Parameter names look like",
        ),
    ],
)
def test_wrong_groups_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_task(**options)


@pytest.mark.parametrize("options", [{"freeze": ["*"]}, {"attention_lr": 0, "freeze": ["backbone.[!d]*"]}])
def test_nothing_to_train_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Every parameter is frozen or has a learning rate of 0"):
        fit(tiny_task(**options), max_steps=1)


def test_resuming_with_other_groups_is_refused(tmp_path: Path) -> None:
    fit(tiny_task(attention="se"), max_epochs=1, enable_checkpointing=True, callbacks=[save(tmp_path)])
    task = tiny_task(attention="se", attention_lr=0.1)
    with pytest.raises(ValueError, match=r"was trained with attention_lr=1\.0, but the task has 0.1"):
        fit(task, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")


def save(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True)


# ---- freeze


@pytest.mark.parametrize(
    "freeze", [["backbone.stem", "backbone.norm.*", "backbone.blocks.0.[cb]*"], ["backbone.[sn]*"]]
)
def test_what_is_frozen_stays_as_it_is_and_its_norms_too(freeze: list[str]) -> None:
    task = tiny_task(attention="se", freeze=freeze, weight_decay=0.1)
    assert task.hparams["freeze"] == freeze
    before = states(task)
    task.train()
    fit(task, max_epochs=2)
    frozen = set(before) - moved(task, before)
    expected = {name for name in before if name.startswith(("stem.", "norm."))}
    if len(freeze) == 3:
        expected |= {name for name in before if name.startswith(("blocks.0.conv", "blocks.0.bn"))}
    assert frozen == expected
    assert not task.get_submodule("backbone.norm").training
    assert task.get_submodule("backbone.blocks.1.bn").training


def test_weight_averaging_of_lightning_leaves_frozen_norms_as_they_are() -> None:
    task = tiny_task(freeze=["backbone.[sn]*"])
    task.get_buffer("backbone.norm.running_mean").fill_(0.5)  # as pretrained
    before = states(task)
    fit(task, callbacks=[StochasticWeightAveraging(0.01, swa_epoch_start=1)], max_epochs=3)
    changed = moved(task, before)
    assert not any(name.startswith(("stem.", "norm.")) for name in changed)
    assert "blocks.0.bn.running_mean" in changed


def test_all_but_attention_and_head_are_frozen() -> None:
    task = tiny_task(attention="se", freeze="all-but-attention-and-head")
    before = states(task)
    fit(task, max_epochs=1)
    trained = {*names(task.backbone, attention_parameters(task)), "head.weight", "head.bias"}
    assert {name for name, each in task.backbone.named_parameters() if each.requires_grad} == trained
    assert moved(task, before) <= trained
    assert {"head.weight"} < moved(task, before)


def test_a_detector_keeps_its_head_and_its_frozen_layers() -> None:
    small: dict[str, Any] = {"backbone_args": {"depth": 11}, "detector_args": {"min_size": 64}, "attention": "se"}
    task = DetectionTask("fcos", "cifar_resnet", 3, **small, freeze="all-but-attention-and-head")
    trained = {name for name, each in task.named_parameters() if each.requires_grad}
    body = "detector.backbone.body."
    assert {name for name in trained if name.startswith(body)} == {
        name for name, _ in task.named_parameters() if name.startswith(body) and ".dia." in name
    }
    assert {name for name, _ in task.named_parameters() if not name.startswith(body)} <= trained
    both = DetectionTask(
        "fcos", "cifar_resnet", 3, **small, trainable_layers=1, frozen_norm=True, freeze=[f"{body}layer3"]
    )
    left = {name for name, each in both.named_parameters() if each.requires_grad and name.startswith(body)}
    assert left
    assert all(".dia." in name and not name.startswith(f"{body}layer3") for name in left)


def test_a_denoiser_ends_with_its_last_convolution() -> None:
    args = {"block_out_channels": [16, 32], "layers_per_block": 1}
    task = DiffusionTask("unet", image_shape=[1, 8, 8], backbone_args=args, freeze="all-but-attention-and-head")
    assert [name for name, each in task.named_parameters() if each.requires_grad] == [
        "backbone.conv_out.weight",
        "backbone.conv_out.bias",
    ]


# ---- Lightning's finetuning


class FreezesAll(BaseFinetuning):
    """A callback of a user's own, that takes the head for a part outside of the backbone."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=10)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("callback", [partial(BackboneFinetuning, 1), FreezesAll])
@pytest.mark.parametrize("schedule", ["cosine", partial(LambdaLR, lr_lambda=lambda epoch: 1 / (1 + epoch))])
def test_finetuning_trains_head_and_attention_first_and_resumes(tmp_path: Path, callback: Any, schedule: Any) -> None:
    options: dict[str, Any] = {"attention": "se", "attention_lr": 0.5, "schedule": schedule, "warmup_steps": 6}
    task = tiny_task(**options)
    before = states(task)
    fit(task, max_epochs=1, callbacks=[callback()])
    trained = {name for name in moved(task, before) if "running" not in name and "num_batches" not in name}
    assert {"head.weight", "head.bias"} <= trained
    assert any(".dia." in name for name in trained)
    assert not any("conv" in name or "stem" in name for name in trained)

    torch.manual_seed(0)
    whole_task = tiny_task(**options)
    start = states(whole_task)
    whole = fit(whole_task, max_epochs=3, callbacks=[callback()])
    assert {len(rates) for rates in whole.seen[:4]} == {2}
    assert {len(rates) for rates in whole.seen[4:]} == {3}
    assert "blocks.1.conv.weight" in moved(whole_task, start)
    ratio = [rates[2] / rates[0] for rates in whole.seen[4:]]
    if callback is FreezesAll:  # follows the schedule and the warm-up of the rest
        assert ratio == pytest.approx([0.1] * 8)
    else:  # doubled by the callback at its epochs
        assert ratio[:4] == pytest.approx([0.1] * 4)

    torch.manual_seed(0)
    saves: dict[str, Any] = {"enable_checkpointing": True}
    fit(tiny_task(**options), max_epochs=3, callbacks=[callback(), StopAfter(2), save(tmp_path)], **saves)
    rest_task = tiny_task(**options)
    rest = fit(rest_task, max_epochs=3, callbacks=[callback()], ckpt_path=tmp_path / "last.ckpt")
    assert rest.seen == whole.seen[8:]
    for name, value in whole_task.state_dict().items():
        if not name.startswith(("train_", "val_", "test_", "confusion")):
            torch.testing.assert_close(rest_task.state_dict()[name], value, msg=name)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_two_processes_agree_on_what_was_unfrozen() -> None:
    task = tiny_task()
    before = states(task)
    fit(task, callbacks=[BackboneFinetuning(1), Agree()], max_epochs=2, **on_two_processes())
    assert "stem.weight" in moved(task, before)


class Agree(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        both = trainer.strategy.all_gather(pl_module.get_parameter("backbone.stem.weight").detach())
        assert torch.equal(both[0], both[1])


class StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_what_is_frozen_by_the_option_no_callback_trains() -> None:
    task = tiny_task(freeze=["backbone.stem"])
    before = states(task)
    fit(task, max_epochs=2, callbacks=[BackboneFinetuning(1)])
    assert {"stem.weight", "stem.bias"}.isdisjoint(moved(task, before))
    assert "blocks.0.conv.weight" in moved(task, before)


def test_backbone_finetuning_finds_the_backbone_of_a_detector() -> None:
    small: dict[str, Any] = {"backbone_args": {"depth": 11}, "detector_args": {"min_size": 64}, "attention": "se"}
    task = DetectionTask("fcos", "cifar_resnet", 3, **small)
    keys = set(task.state_dict())
    BackboneFinetuning().freeze_before_training(task)
    frozen = {name for name, each in task.named_parameters() if not each.requires_grad}
    assert frozen
    assert all(name.startswith("detector.backbone.body.") for name in frozen)
    assert keys == set(task.state_dict())


class Unfreezes(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.backbone.stem.requires_grad_(True)


def test_parameters_that_no_optimizer_has_are_named() -> None:
    task = tiny_task()
    task.backbone.stem.requires_grad_(False)
    with pytest.warns(UserWarning, match="2 parameters were unfrozen but are in no optimizer group"):
        fit(task, max_epochs=1, callbacks=[Unfreezes()])


def test_a_trained_task_can_be_copied() -> None:
    task = tiny_task()
    fit(task, max_epochs=1)
    assert states(copy.deepcopy(task)).keys() == states(task).keys()
    pickle.dumps(task)
