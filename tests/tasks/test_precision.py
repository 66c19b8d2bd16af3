"""Every task in every precision of the trainer: the numbers of float32, or one line that says why not."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from dia_lightning.callbacks import EMA
from dia_lightning.tasks import ClassificationTask, DetectionTask
from dia_lightning.tasks._mean import Mean
from tests.tasks import test_diffusion, tiny_detection
from tests.tasks.conftest import Given, small_task, small_trainer

HALF = ["bf16-true", "16-true"]
#: How far a loss may be from that of float32 with the same weights, as the tasks' documentation has it.
BOUNDS = {"16-mixed": 0.01, "bf16-mixed": 0.01, "16-true": 0.01, "bf16-true": 0.01, "64-true": 1e-5}
CASES = list(itertools.product(("classification", "diffusion", "detection"), BOUNDS))


def task_and_batches(name: str) -> tuple[LightningModule, list[Any]]:
    """A network whose outputs are far from uniform, since a loss of log(10) would be right by chance."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if name == "classification":
        task: LightningModule = small_task()
        images = torch.randn(3, 8, 3, 8, 8, generator=generator)
        batches: list[Any] = [(part, torch.arange(8) % 10, torch.arange(8)) for part in images]
    elif name == "diffusion":
        task = test_diffusion.attached_task(lr=0.05)
        batches = [(*test_diffusion.some_batch(), torch.arange(4))] * 3
    else:
        task = tiny_detection.tiny_task("retinanet", validation_loss=True)
        return task, [tiny_detection.tiny_batch(2, 1, seed=seed) for seed in range(3)]
    with torch.no_grad():
        for part in task.parameters():
            if part.ndim > 1:
                part.mul_(1.5)
    return task, batches


class Averages(Callback):
    """Notes the average of EMA after every step."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.seen: list[list[Tensor]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        average: Any = self.ema._average_model
        self.seen.append([part.detach().clone() for part in average.module.parameters()])


@cache
def losses(name: str, precision: str) -> dict[str, float]:
    task, batches = task_and_batches(name)
    trainer = small_trainer(Path(), precision=precision, callbacks=[], enable_checkpointing=False)
    trainer.validate(task, Given(batches), verbose=False)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {key: found[key] for key in ("val/loss", "val/classification", "val/bbox_regression") if key in found}


def refused(name: str, precision: str) -> bool:
    return name == "detection" and precision in HALF


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_the_losses_of_the_same_weights_are_those_of_float32(name: str, precision: str) -> None:
    if refused(name, precision):
        with pytest.raises(
            ValueError,
            match=f"precision='{precision}' would round boxes and anchors, above 512 pixels to .* bf16-mixed",
        ):
            losses(name, precision)
        return
    assert losses(name, precision) == pytest.approx(losses(name, "32-true"), rel=BOUNDS[precision])


@pytest.mark.filterwarnings("ignore:precision='16-true' has no loss scaling")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("classification", precision) for precision in BOUNDS),
        *(("diffusion", precision) for precision in HALF),
        *(("detection", precision) for precision in ("16-mixed", "64-true")),
    ],
)
def test_training_moves_the_weights_and_a_slow_average(name: str, precision: str, tmp_path: Path) -> None:
    task, batches = task_and_batches(name)
    before = [part.detach().clone() for part in task.parameters()]
    ema = EMA(decay=0.99, warmup=False)
    averages = Averages(ema)
    options: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": False}
    trainer = small_trainer(tmp_path, precision=precision, callbacks=[ema, averages], **options)
    trainer.fit(task, Given(batches))
    assert trainer.callback_metrics["train/loss"].dtype in (torch.float32, torch.float64)
    moved = [not torch.equal(old.to(new.dtype), new) for old, new in zip(before, averages.seen[0], strict=True)]
    assert sum(moved) > len(moved) / 2
    first, last = averages.seen[0], averages.seen[-1]
    drifted = [not torch.equal(old, new) for old, new in zip(first, last, strict=True)]
    assert sum(drifted) > len(drifted) / 2  # a hundredth of a step, of which bfloat16 knows nothing


# ---- sums


def test_a_mean_forgets_no_small_value() -> None:
    mean = Mean()
    mean.update(torch.tensor([2.0**24]))
    for _ in range(1000):  # of which float32 would keep none
        mean.update(torch.tensor(0.1))
    assert float(mean.compute()) == pytest.approx((2**24 + 100) / 1001, rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_mean_stays_in_float32(dtype: torch.dtype) -> None:
    mean = Mean()
    mean.update(torch.full((257,), 1.001))
    mean.to(dtype)
    mean.update(torch.full((3, 100), 1.001, dtype=torch.float64), weight=2)
    mean.update(torch.tensor(torch.inf), weight=0)
    assert mean.compute().dtype == torch.float32
    assert float(mean.compute()) == pytest.approx(1.001, rel=1e-6)
    assert int(mean.count) == 857


def test_a_loss_that_is_nan_is_in_the_mean() -> None:
    mean = Mean()
    mean.update(torch.tensor([1.0, torch.nan]))
    assert mean.compute().isnan()


class Fixed(nn.Module):
    """A "classifier" of 5 classes that is right about one image in three."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits = images.new_zeros(len(images), 5)
        logits[:, 0] = 1.0
        return logits.add_(0 * self.layer(images.flatten(1)))


@pytest.mark.parametrize("precision", [*HALF, "bf16-mixed", "32-true"])
def test_sums_of_many_batches_are_exact(precision: str, tmp_path: Path) -> None:
    labels = torch.arange(900) // 300
    batches = [(torch.zeros(15, 1, 2, 2), part, torch.arange(15)) for part in labels.reshape(-1, 15)]
    task = ClassificationTask(Fixed(), 5)
    trainer = small_trainer(tmp_path, precision=precision)
    loss = float(torch.tensor([1.0, 0, 0, 0, 0]).logsumexp(0)) - 1 / 3
    for stage, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        evaluate(task, Given(batches), verbose=False)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        expected = {f"{stage}/loss": loss, f"{stage}/acc": 1 / 3, f"{stage}/acc_macro": 1 / 3}
        assert logged == pytest.approx(expected, rel=1e-5)
    assert task.confusion is not None
    assert task.confusion.compute()[:, 0].tolist() == [300, 300, 300, 0, 0]


# ---- boxes


class Exact(nn.Module):
    """A "detector" that finds objects far from the corner, where bfloat16 has a number for every 8th pixel only."""

    boxes = torch.tensor([[1001.3, 1003.4, 1013.5, 1017.6], [1501.0, 3.0, 1511.0, 15.0]])

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        found = {"boxes": self.boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8])}
        return [dict(found) for _ in images]


@pytest.mark.parametrize("precision", [precision for precision in BOUNDS if precision not in HALF])
def test_true_boxes_keep_their_pixels(precision: str, tmp_path: Path) -> None:
    target = {"boxes": Exact.boxes, "labels": torch.tensor([1, 2])}
    trainer = small_trainer(tmp_path, precision=precision)
    batch = ([torch.rand(3, 8, 8)], [target], torch.arange(1))
    trainer.validate(DetectionTask(Exact(), num_classes=2), Given([batch]), verbose=False)
    assert float(trainer.callback_metrics["val/map"]) == pytest.approx(1.0, abs=1e-6)


# ---- what leaves the task


@pytest.mark.parametrize("precision", HALF)
def test_predictions_can_be_read_by_numpy(precision: str, tmp_path: Path) -> None:
    task, batches = task_and_batches("classification")
    trainer = small_trainer(tmp_path, precision=precision)
    found: Any = trainer.predict(task, Given(batches))
    assert found[0]["probabilities"].numpy().sum(1) == pytest.approx(1, abs=1e-6)


# ---- float16 without a loss scale


@pytest.mark.parametrize("optimizer", ["adamw", torch.optim.RMSprop])
def test_an_optimizer_that_divides_by_zero_in_float16_is_refused(
    optimizer: str | Callable[..., Any], tmp_path: Path
) -> None:
    task = small_task(optimizer=optimizer)
    with pytest.raises(ValueError, match="divides by eps=1e-08, which is 0 with precision='16-true'"):
        small_trainer(tmp_path, precision="16-true").fit(task, Given([]))


def test_lost_gradients_are_told(tmp_path: Path) -> None:
    task, batches = task_and_batches("classification")
    with pytest.warns(UserWarning, match="no loss scaling: gradients below 6e-8 are lost"):
        small_trainer(tmp_path, precision="16-true", limit_val_batches=0).fit(task, Given(batches[:1]))
