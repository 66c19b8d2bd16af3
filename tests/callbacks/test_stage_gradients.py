"""The callback `StageGradients`, against torch's own gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from torch import Tensor

from dia_lightning.callbacks import StageGradients
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask
from tests.callbacks.tiny_classifier import tiny_trainer
from tests.two_processes import on_two_processes

STAGES = ["backbone.layer1", "backbone.layer2", "backbone.layer3"]


def task(**options: Any) -> ClassificationTask:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"attention": "dia-lstm", **options}
    network = {"depth": 14, "block": "basic", **arguments.pop("backbone_args", {})}
    return ClassificationTask("cifar_resnet", 10, backbone_args=network, **arguments)


def digits(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(image_size=8, augment="none", **{"batch_size": 10, "limit": 40, **options})


class ByHand(Callback):
    """Computes the gradients at the end of every stage of the first batch of every step, from a copy of the weights."""

    def __init__(self, file: Path | None = None, **options: Any) -> None:
        self.file = file  # for what is found in another process
        self.options = options
        self.found: dict[int, list[Tensor]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.found:
            return
        model = task(**self.options)
        model.load_state_dict(pl_module.state_dict())
        outputs: list[Tensor] = []
        for stage in STAGES:
            model.get_submodule(stage).register_forward_hook(lambda *args: outputs.append(args[2]))
        loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        self.found[trainer.global_step] = [one.abs() for one in torch.autograd.grad(loss, outputs)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.file is not None and trainer.is_global_zero:
            torch.save(self.found, self.file)


def rows_of(trainer: Trainer) -> dict[int, dict[str, float]]:
    assert isinstance(trainer.logger, CSVLogger)
    lines = [line.split(",") for line in (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()]
    found: dict[int, dict[str, float]] = {}
    for line in lines[1:]:
        row = {name: float(value) for name, value in zip(lines[0], line, strict=True) if value}
        if any(name.startswith("train/gradient") for name in row):
            assert int(row["step"]) not in found
            found[int(row["step"])] = row
    return found


def check(found: dict[int, dict[str, float]], wanted: dict[int, list[Tensor]], steps: list[int]) -> None:
    assert sorted(found) == steps
    for step in steps:
        for number, sizes in enumerate(wanted[step]):
            assert found[step][f"train/gradient_stage{number}"] == pytest.approx(sizes.mean().item(), rel=1e-4)
            assert found[step][f"train/gradient_median_stage{number}"] == pytest.approx(
                sizes.median().item(), rel=1e-3, abs=1e-12
            )


@pytest.mark.parametrize("every", [1, 3])
def test_every_n_steps_the_gradients_are_those_of_autograd(tmp_path: Path, every: int) -> None:
    hand, model = ByHand(), task()
    logger = CSVLogger(tmp_path)
    trainer = tiny_trainer(
        tmp_path, hand, StageGradients(every_n_steps=every), logger=logger, max_epochs=2, log_every_n_steps=50
    )
    trainer.fit(model, digits())
    check(rows_of(trainer), hand.found, list(range(0, 8, every)))
    with Image.open(Path(logger.log_dir) / "pictures" / "train" / "gradients_of_stages" / "step=000008.png") as picture:
        assert picture.width > picture.height > 200


def test_a_compiled_network_is_measured_uncompiled(tmp_path: Path) -> None:
    hand, callback = ByHand(attention=None), StageGradients(every_n_steps=2, blocks=STAGES)
    trainer = tiny_trainer(tmp_path, hand, callback, logger=CSVLogger(tmp_path), limit_val_batches=0)
    with torch.compiler.set_stance(force_backend="eager"):  # of the steps between
        trainer.fit(task(attention=None, compile=True), digits())
    check(rows_of(trainer), hand.found, [0, 2])


def test_accumulated_gradients_count_once_per_step_and_undivided(tmp_path: Path) -> None:
    hand, model = ByHand(), task()
    trainer = tiny_trainer(tmp_path, hand, StageGradients(), logger=CSVLogger(tmp_path), accumulate_grad_batches=2)
    trainer.fit(model, digits())
    check(rows_of(trainer), hand.found, [0, 1])


def test_the_factor_of_a_loss_scaler_is_taken_out(tmp_path: Path) -> None:
    results = []
    for scale in (None, 2.0**10):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        precision = MixedPrecision("bf16-mixed" if scaler is None else "16-mixed", "cpu", scaler)
        trainer = tiny_trainer(tmp_path, StageGradients(), logger=CSVLogger(tmp_path), plugins=precision, max_steps=1)
        trainer.fit(task(), digits())
        results.append(rows_of(trainer)[0])
    for name in ("train/gradient_stage0", "train/gradient_stage2"):
        assert results[1][name] == pytest.approx(results[0][name], rel=0.2)  # half and bfloat16 round in their own ways


class KeepGradients(Callback):
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.kept += [weight.grad.clone() for weight in pl_module.parameters() if weight.grad is not None]


def test_training_is_bit_equal_with_and_without(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [StageGradients()]):
        gradients, model = KeepGradients(), task()
        torch.manual_seed(1)
        tiny_trainer(tmp_path, gradients, *callbacks, max_epochs=2).fit(model, digits(num_workers=0))
        results.append([*gradients.kept, *model.state_dict().values()])
        assert not any(model.get_submodule(f"{stage}.1")._forward_hooks for stage in STAGES)
    assert len(results[0]) > 100
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("stages", [[], [1, 2, 3]])
def test_a_plain_network_has_named_blocks_also_without_shortcuts(tmp_path: Path, stages: list[int]) -> None:
    options: dict[str, Any] = {"attention": None, "backbone_args": {"no_shortcut": stages}}
    hand, callback = ByHand(**options), StageGradients(blocks=STAGES)
    trainer = tiny_trainer(tmp_path, hand, callback, logger=CSVLogger(tmp_path))
    trainer.fit(task(**options), digits())
    check(rows_of(trainer), hand.found, [0, 1, 2, 3])


def test_a_resumed_run_keeps_its_distribution(tmp_path: Path) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path, filename="kept")
    tiny_trainer(tmp_path, StageGradients(), kept, enable_checkpointing=True).fit(task(), digits())
    callback = StageGradients()
    trainer = tiny_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(task(), digits(), ckpt_path=tmp_path / "kept.ckpt", weights_only=True)
    assert [len(values) for values in callback.state_dict()["means"].values()] == [8, 8, 8]


def test_another_fit_has_a_distribution_of_its_own(tmp_path: Path) -> None:
    callback = StageGradients()
    for _ in range(2):
        tiny_trainer(tmp_path, callback).fit(task(), digits())
    assert [len(values) for values in callback.state_dict()["means"].values()] == [4, 4, 4]


class Interrupt(Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        raise RuntimeError("interrupted")


def test_an_interrupted_step_leaves_the_network_alone(tmp_path: Path) -> None:
    model = task()
    with pytest.raises(RuntimeError, match="interrupted"):
        tiny_trainer(tmp_path, StageGradients(), Interrupt()).fit(model, digits())
    assert not any(model.get_submodule(f"{stage}.1")._forward_hooks for stage in STAGES)


def test_stages_that_no_gradient_reaches_are_said(tmp_path: Path) -> None:
    model = task(attention=None)
    for module in (model.backbone.conv1, model.backbone.bn1, model.backbone.layer1):
        module.requires_grad_(False)
    trainer = tiny_trainer(tmp_path, StageGradients(blocks=STAGES), logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match=r"No gradient reached backbone\.layer1 in training"):
        trainer.fit(model, digits())
    assert "train/gradient_stage0" not in rows_of(trainer)[0]
    assert rows_of(trainer)[0]["train/gradient_stage1"] > 0


def test_in_a_distributed_run_the_first_process_logs_its_own(tmp_path: Path) -> None:
    logger, hand = CSVLogger(tmp_path, version=0), ByHand(tmp_path / "found.pt")
    trainer = tiny_trainer(tmp_path, hand, StageGradients(), logger=logger, **on_two_processes())
    trainer.fit(task(), digits(batch_size=5))
    check(rows_of(trainer), torch.load(tmp_path / "found.pt"), [0, 1, 2, 3])
    assert (tmp_path / "lightning_logs/version_0/pictures/train/gradients_of_stages/step=000004.png").exists()


class Named(torch.nn.Module):
    def forward(self, logits: Tensor) -> dict[str, Tensor]:
        return {"logits": logits}


def test_a_block_that_returns_no_tensor_is_named(tmp_path: Path) -> None:
    model = task()
    model.named = Named()
    model.register_forward_hook(lambda module, args, logits: module.named(logits)["logits"])
    with pytest.raises(ValueError, match="the output of named is a dict and no features"):
        tiny_trainer(tmp_path, StageGradients(blocks=["named"])).fit(model, digits())


def test_mistakes_are_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_steps must be 1 or more, got 0"):
        StageGradients(every_n_steps=0)
    for model, callback, message in (
        (task(attention=None), StageGradients(), "blocks must be given for a network without attention"),
        (task(), StageGradients(blocks=["layer1"]), r"the task has no module 'layer1'\. Name modules as task\.named"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_trainer(tmp_path, callback).fit(model, digits())
