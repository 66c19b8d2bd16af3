import copy
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dia_lightning.attention import attach
from dia_lightning.callbacks import EMA
from dia_lightning.models import get_model
from tests.callbacks.tiny_classifier import TinyData, TinyTask, tiny_trainer

State = dict[str, Tensor]


def state_of(module: torch.nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Recorder(Callback):
    """Remembers the state of the model after each optimizer step and in each validation, test and prediction."""

    def __init__(self) -> None:
        self.trained: list[State] = []
        self.validated: list[State] = []
        self.tested: list[State] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > len(self.trained):
            self.trained.append(state_of(pl_module))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.validated.append(state_of(pl_module))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tested.append(state_of(pl_module))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tested.append(state_of(pl_module))


def average_by_hand(states: list[State], decay: Callable[[int], float]) -> State:
    """The definition, in float64 and one weight at a time: the first state is copied, counters are never averaged."""
    average = {name: value.double() for name, value in states[0].items()}
    for updates, state in enumerate(states[1:], start=1):
        d = decay(updates)
        for name, value in state.items():
            average[name] = (
                d * average[name] + (1 - d) * value.double() if value.is_floating_point() else value.double()
            )
    return average


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


def differ(first: State, second: State) -> bool:
    return any(not torch.equal(first[name], second[name]) for name in first)


def fit(
    folder: Path, ema: EMA | None, task: LightningModule | None = None, ckpt_path: Path | None = None, **options: Any
) -> tuple[LightningModule, Recorder, Trainer]:
    torch.manual_seed(0)
    task = task or TinyTask()
    recorder = Recorder()
    trainer = tiny_trainer(folder, *[] if ema is None else [ema], recorder, **{"max_epochs": 2, **options})
    trainer.fit(task, datamodule=TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return task, recorder, trainer


@pytest.mark.parametrize(
    ("ema", "decay"),
    [
        (EMA(decay=0.9, warmup=False), lambda n: 0.9),
        (EMA(decay=0.5), lambda n: min(0.5, (1 + n) / (10 + n))),
        (EMA(decay=0.0), lambda n: 0.0),
    ],
    ids=["constant", "warm-up", "zero"],
)
def test_fit_ends_with_the_average_of_the_definition(tmp_path: Path, ema: EMA, decay: Callable[[int], float]) -> None:
    task, recorder, _ = fit(tmp_path, ema)
    assert len(recorder.trained) == ema.updates == 12
    assert_close(task.state_dict(), average_by_hand(recorder.trained, decay))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_average_is_as_exact_in_every_precision(tmp_path: Path, precision: str) -> None:
    """In bfloat16 an average of this decay would stand still; here it outlives validations, too."""
    options: dict[str, Any] = {"precision": precision, "max_epochs": 2}
    ema = EMA(decay=0.999, warmup=False)
    task, recorder, trainer = fit(tmp_path, ema, **options)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    expected = average_by_hand(recorder.trained, lambda n: 0.999)
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert_close(state, expected)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float64
    assert task.state_dict()["net.2.weight"].dtype == dtype
    torch.testing.assert_close(task.state_dict()["net.2.weight"], expected["net.2.weight"].to(dtype))
    assert differ(
        {"mean": recorder.validated[-1]["net.1.running_mean"]}, {"mean": recorder.trained[-1]["net.1.running_mean"]}
    )


def test_a_checkpoint_of_a_validation_has_the_exact_average(tmp_path: Path) -> None:
    class Saver(Callback):
        def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "amid.ckpt")

    options: dict[str, Any] = {"precision": "bf16-true", "max_epochs": 1, "num_sanity_val_steps": 0}
    ema, recorder = EMA(decay=0.999, warmup=False), Recorder()
    tiny_trainer(tmp_path, ema, recorder, Saver(), **options).fit(TinyTask(), datamodule=TinyData())
    checkpoint = torch.load(tmp_path / "amid.ckpt", weights_only=True)
    assert_close(checkpoint["state_dict"], average_by_hand(recorder.trained, lambda n: 0.999))
    assert_same(checkpoint["current_model_state"], recorder.trained[-1])


def test_batch_norm_statistics_are_averaged_and_counters_copied(tmp_path: Path) -> None:
    task, recorder, _ = fit(tmp_path, EMA(decay=0.9, warmup=False))
    last = recorder.trained[-1]
    assert differ({"mean": task.state_dict()["net.1.running_mean"]}, {"mean": last["net.1.running_mean"]})
    assert int(task.state_dict()["net.1.num_batches_tracked"]) == int(last["net.1.num_batches_tracked"]) == 12


def test_the_first_steps_can_be_left_out(tmp_path: Path) -> None:
    task, recorder, _ = fit(tmp_path, EMA(decay=0.9, warmup=False, start_step=7))
    assert_close(task.state_dict(), average_by_hand(recorder.trained[7:], lambda n: 0.9))


def test_a_start_that_is_never_reached_keeps_the_trained_weights_and_warns(tmp_path: Path) -> None:
    plain, *_ = fit(tmp_path, None)
    with pytest.warns(UserWarning, match="EMA never began: start_step=12, but training took 12 optimizer steps"):
        task, recorder, _ = fit(tmp_path, EMA(start_step=12))
    assert_same(task.state_dict(), plain.state_dict())
    assert_same(recorder.validated[-1], recorder.trained[-1])


def test_training_itself_is_not_changed(tmp_path: Path) -> None:
    _, plain, _ = fit(tmp_path, None)
    _, averaged, _ = fit(tmp_path, EMA(decay=0.9))
    for first, second in zip(plain.trained, averaged.trained, strict=True):
        assert_same(first, second)


def test_validation_sees_the_average_and_sanity_checking_the_first_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = state_of(TinyTask())
    _, recorder, _ = fit(tmp_path, EMA(decay=0.9, warmup=False))
    sanity, first, second = recorder.validated
    assert_same(sanity, start)
    assert_close(first, average_by_hand(recorder.trained[:6], lambda n: 0.9))
    assert_close(second, average_by_hand(recorder.trained, lambda n: 0.9))


def test_with_accumulated_gradients_there_is_one_update_per_optimizer_step(tmp_path: Path) -> None:
    ema = EMA(decay=0.9, warmup=False)
    task, recorder, _ = fit(tmp_path, ema, accumulate_grad_batches=3)
    assert len(recorder.trained) == ema.updates == 4
    # the batch norm also moves in the batches without an optimizer step, so compare weights only
    expected = average_by_hand(recorder.trained, lambda n: 0.9)
    torch.testing.assert_close(task.state_dict()["net.2.weight"].double(), expected["net.2.weight"])


def test_a_checkpoint_holds_the_average_as_weights_and_the_trained_weights_beside_it(tmp_path: Path) -> None:
    task, recorder, _ = fit(tmp_path, EMA(decay=0.9), enable_checkpointing=True)
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert_same(checkpoint["state_dict"], task.state_dict())
    assert_same(checkpoint["current_model_state"], recorder.trained[-1])
    assert int(checkpoint["averaging_state"]["n_averaged"]) == 12


def test_a_checkpoint_from_before_the_start_holds_the_trained_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, recorder, _ = fit(tmp_path, EMA(start_step=50), enable_checkpointing=True)
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert_same(checkpoint["state_dict"], recorder.trained[-1])


@pytest.mark.parametrize(("start_step", "precision"), [(0, 32), (3, 32), (8, 32), (3, "bf16-true")])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
    tmp_path: Path, start_step: int, precision: Any
) -> None:
    def ema() -> EMA:
        return EMA(decay=0.9, start_step=start_step)

    whole, _, trainer = fit(tmp_path, ema(), max_epochs=3, precision=precision)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    options: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 1, "precision": precision}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path / "half", ema(), **options)
    half = next((tmp_path / "half").rglob("*.ckpt"))
    resumed, _, trainer = fit(tmp_path, ema(), ckpt_path=half, max_epochs=3, precision=precision)
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")
    assert_same(resumed.state_dict(), whole.state_dict())
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.ckpt", "resumed.ckpt"))
    for part in ("averaging_state", "state_dict"):
        assert_same(first[part], second[part])
    assert first["callbacks"]["EMA"] == second["callbacks"]["EMA"]


@pytest.mark.parametrize("entry", ["test", "predict"])
def test_test_and_predict_after_fit_use_the_average_of_the_checkpoint_they_are_given(
    tmp_path: Path, entry: str
) -> None:
    task, recorder, trainer = fit(tmp_path, EMA(decay=0.9), enable_checkpointing=True, max_epochs=1)
    average = state_of(task)
    path = next(tmp_path.rglob("*.ckpt")).rename(tmp_path / "first.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(task, datamodule=TinyData())
    getattr(trainer, entry)(task, datamodule=TinyData(), ckpt_path=path, weights_only=True)
    assert differ(average, recorder.trained[-1])
    assert_same(recorder.tested[-1], average)


def test_validate_after_fit_uses_the_weights_it_is_given(tmp_path: Path) -> None:
    task, recorder, trainer = fit(tmp_path, EMA(decay=0.9))
    torch.nn.init.zeros_(task.get_parameter("net.2.weight"))
    given = state_of(task)
    trainer.validate(task, datamodule=TinyData(), verbose=False)
    assert_same(recorder.validated[-1], given)
    assert_same(task.state_dict(), given)


class FailingTask(TinyTask):
    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        if self.trainer.global_step > 0 and batch_idx == 1:
            raise RuntimeError("stop here")
        return super().validation_step(batch, batch_idx)


def test_an_exception_in_validation_leaves_the_trained_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, recorder = FailingTask(), Recorder()
    trainer = tiny_trainer(tmp_path, EMA(decay=0.9), recorder)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(task, datamodule=TinyData())
    assert_same(task.state_dict(), recorder.trained[-1])
    assert differ(recorder.validated[-1], recorder.trained[-1])


class SaveInValidation(Callback):
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "in_validation.ckpt")


def test_a_checkpoint_saved_during_validation_is_not_the_wrong_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, recorder = TinyTask(), Recorder()
    tiny_trainer(tmp_path, EMA(decay=0.9), recorder, SaveInValidation()).fit(task, datamodule=TinyData())
    checkpoint = torch.load(tmp_path / "in_validation.ckpt", weights_only=True)
    assert_same(checkpoint["state_dict"], recorder.validated[-1])
    assert_same(checkpoint["current_model_state"], recorder.trained[-1])


def test_a_second_fit_averages_from_its_own_first_step(tmp_path: Path) -> None:
    ema = EMA(decay=0.9)
    fit(tmp_path, ema)
    _, recorder, _ = fit(tmp_path, ema, max_epochs=1)
    assert len(recorder.trained) == ema.updates == 6


@pytest.mark.parametrize(("device", "expected"), [(None, "meta"), ("cpu", "cpu")])
def test_the_average_follows_the_model_to_its_device_unless_told_otherwise(
    tmp_path: Path, device: str | None, expected: str
) -> None:
    ema, task, trainer = EMA(device=device), TinyTask(), tiny_trainer(tmp_path)
    ema.setup(trainer, task, "fit")
    task.to("meta")  # as the strategy does with an accelerator, between the two hooks
    ema.on_fit_start(trainer, task)
    average = ema._average_model
    assert average is not None
    assert {value.device.type for value in average.module.state_dict().values()} == {expected}
    assert average.n_averaged.device.type == "cpu"


class AttachedTask(TinyTask):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(attach(get_model("cifar_resnet", depth=20, num_classes=3), "dia-lstm"))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step((batch[0].expand(-1, 3, -1, -1), batch[1]), batch_idx)

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        return super().predict_step((batch[0].expand(-1, 3, -1, -1), batch[1]), batch_idx)


def test_the_average_of_an_attached_network_has_its_own_attention_unit(tmp_path: Path) -> None:
    task, recorder, _ = fit(tmp_path, EMA(decay=0.9), AttachedTask(), max_epochs=1)
    expected = average_by_hand(recorder.trained, lambda n: min(0.9, (1 + n) / (10 + n)))
    units = [name for name in expected if ".dia." in name]
    assert units
    assert_close(task.state_dict(), expected)
    assert all(differ({"unit": recorder.trained[-1][name]}, {"unit": task.state_dict()[name]}) for name in units)


def test_the_callback_can_be_copied_and_pickled() -> None:
    ema = EMA(decay=0.9, warmup=False, start_step=3)
    for other in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert (other.decay_at(100), other.start_step) == (0.9, 3)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        EMA(decay=decay)


def test_a_negative_start_is_refused() -> None:
    with pytest.raises(ValueError, match="start_step must be 0 or more"):
        EMA(start_step=-1)
