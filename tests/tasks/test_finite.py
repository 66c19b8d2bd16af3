"""Nothing that is NaN or infinite is ever saved, wherever it comes from."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from dia_lightning.callbacks import EMA
from dia_lightning.tasks import ClassificationTask, NonFiniteLossError
from tests.tasks.tiny_training import fit, tiny_task

Place = Literal["data", "gradient", "weight", "statistics"]


class Poison(Callback):
    """Puts a value into what one step works on; an epoch has four."""

    def __init__(self, place: Place, *, step: int = 7, value: float = float("nan")) -> None:
        self.place, self.step, self.value = place, step, value

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.place == "data" and trainer.global_step == self.step:
            batch[0].view(-1)[0] = self.value

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.place == "gradient" and trainer.global_step == self.step:
            pl_module.backbone.stem.weight.grad.view(-1)[0] = self.value

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step + 1:
            with torch.no_grad():
                if self.place == "weight":
                    pl_module.backbone.head.bias[0] = self.value
                if self.place == "statistics":
                    pl_module.backbone.norm.running_var[0] = self.value


class Overflow(Callback):
    """Makes every gradient infinite before the scaler looks at it."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        pl_module.backbone.stem.weight.grad.fill_(float("inf"))


def kept(folder: Path) -> dict[str, Any]:
    [path] = folder.glob("*.ckpt")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def train(folder: Path, *callbacks: Callback, task: ClassificationTask | None = None, **options: Any) -> None:
    saved = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    fit(task or tiny_task(), callbacks=[*callbacks, saved], enable_checkpointing=True, max_epochs=2, **options)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("place", ["data", "gradient", "weight", "statistics"])
def test_the_last_step_of_a_training_saves_no_value_that_is_not_finite(
    tmp_path: Path, place: Place, precision: str
) -> None:
    with pytest.raises(NonFiniteLossError, match="batch 3 of epoch 1"):
        train(tmp_path, Poison(place), precision=precision)
    checkpoint = kept(tmp_path)
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(each).all() for each in checkpoint["state_dict"].values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_stops_before_the_weights_have_it_and_is_named(tmp_path: Path, value: float) -> None:
    task = tiny_task()
    poison = Poison("gradient", step=1, value=value)
    with pytest.raises(NonFiniteLossError, match=r"gradient is (nan|inf) \(in backbone\.stem\.weight\) at batch 1 of"):
        fit(task, callbacks=[poison], max_epochs=1, gradient_clip_val=1.0)
    assert all(torch.isfinite(each).all() for each in task.parameters())


def test_gradients_whose_squares_overflow_are_finite(tmp_path: Path) -> None:
    train(tmp_path, Poison("gradient", value=1e30), gradient_clip_val=0.1, gradient_clip_algorithm="value")
    assert kept(tmp_path)["global_step"] == 8


def test_an_average_is_checked_beside_the_weights(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="became NaN or infinite"):
        train(tmp_path, EMA(start_step=100), Poison("weight"))
    assert kept(tmp_path)["global_step"] == 4


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_squared_gradient_that_overflows_is_not_saved(tmp_path: Path, epoch: int) -> None:
    poison = Poison("gradient", step=4 * epoch + 3, value=1e30)  # its weight would stay where it is for ever
    with pytest.raises(NonFiniteLossError, match=r"exp_avg_sq of the optimizer .* by batch 3 of epoch"):
        train(tmp_path, poison, task=tiny_task(optimizer="adamw", lr=1e-3))
    assert [torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")] == [4][:epoch]


class TestMixed16:
    def options(self, scale: float) -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}

    def test_a_scale_that_is_too_large_is_lowered_as_ever(self, tmp_path: Path) -> None:
        train(tmp_path, **self.options(2.0**40))
        assert kept(tmp_path)["MixedPrecision"]["scale"] < 2.0**40

    def test_a_scale_that_never_fits_ends_the_training(self, tmp_path: Path) -> None:
        with pytest.raises(NonFiniteLossError, match=r"gradient is inf .* at batch 3 of epoch 0"):
            train(tmp_path, Overflow(), **self.options(4.0))  # 4, 2 and 1 may be too large

    def test_a_gradient_that_the_scaler_does_not_see_ends_the_training(self, tmp_path: Path) -> None:
        with pytest.raises(NonFiniteLossError, match="batch 3 of epoch 1"):
            train(tmp_path, Poison("gradient"), **self.options(1.0))
        assert kept(tmp_path)["global_step"] == 4


def test_on_an_accelerator_a_gradient_is_looked_at_with_the_next_loss() -> None:
    task = tiny_task()
    task._largest_gradient, task._place = torch.tensor(float("nan")), "batch 8 of epoch 2"
    with pytest.raises(NonFiniteLossError, match="nan at batch 8 of epoch 2"):
        task.check_loss(torch.tensor(1.0), 9)
    task._largest_gradient = torch.tensor(1.0)
    task.check_loss(torch.tensor(1.0), 9)
    assert task._largest_gradient is None
