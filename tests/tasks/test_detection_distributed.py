"""Two processes on this machine's CPU score what one scores, whatever the number of images."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dia_lightning.datamodules import DigitScenesDataModule
from dia_lightning.tasks.detection import DetectionTask
from dia_lightning.tasks.mean_average_precision import MeanAveragePrecision, Scores
from tests.tasks.conftest import Given, small_trainer
from tests.tasks.test_mean_average_precision import random_images
from tests.tasks.tiny_detection import tiny_task, training_batch
from tests.two_processes import run_on_two_processes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

EVEN, ODD = range(0, 7, 2), range(1, 7, 2)  # 4 and 3 images


class Rote(nn.Module):
    """A "detector" that knows the scenes of a data module, and is a little off with many equal scores."""

    def __init__(self, data: DigitScenesDataModule) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.answers: dict[bytes, dict[str, Tensor]] = {}
        for stage, loader in (("validate", data.val_dataloader), ("test", data.test_dataloader)):
            data.setup(stage)
            for images, targets, _ in loader():
                for image, target in zip(images, targets, strict=True):
                    self.answers[_key(image)] = _answer(target, torch.Generator().manual_seed(int(image.sum())))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.answers[_key(image)] for image in images]


def _answer(target: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    boxes = target["boxes"].as_subclass(Tensor).repeat(2, 1)
    moved = boxes + torch.randint(-2, 3, boxes.shape, generator=generator)
    wrong = torch.rand(len(boxes), generator=generator) < 0.2
    labels = torch.where(wrong, 1, target["labels"].repeat(2))
    scores = torch.randint(5, 9, (len(boxes),), generator=generator).float().sort(descending=True).values / 10
    return {"boxes": moved, "labels": labels, "scores": scores}


def _key(image: Tensor) -> bytes:
    return image.numpy().tobytes()


def digits(**options: Any) -> DigitScenesDataModule:
    return DigitScenesDataModule(image_size=64, train_size=4, val_size=7, test_size=5, **options)


def scores_of(share: Sequence[int], *, masks: bool, padded: bool = False) -> Scores:
    found, true = random_images(7, seed=2, masks=masks)
    metric = MeanAveragePrecision(masks=masks)
    metric.add([found[i] for i in share], [true[i] for i in share], torch.tensor(list(share)))
    if padded:
        metric.add(found[:2], true[:2], torch.tensor([0, -1]))
    return metric.compute()


def results_of_tasks(folder: Path, **options: Any) -> dict[str, dict[str, float]]:
    """Validate and test a task that has nothing to learn, and one with losses; an odd number of images each."""
    data = digits(batch_size=2)
    rote = DetectionTask(Rote(data), num_classes=10)
    trainer = small_trainer(folder, **options)
    dense = tiny_task("retinanet", num_classes=10, validation_loss=True)
    return {
        "validate": dict(trainer.validate(rote, data, verbose=False)[0]),
        "test": dict(trainer.test(rote, data, verbose=False)[0]),
        "losses": dict(trainer.validate(dense, digits(batch_size=1), verbose=False)[0]),
    }


def weights_after_training(folder: Path) -> dict[str, Tensor]:
    """Train one step, where one of the processes has images without objects."""
    task = tiny_task()
    trainer = small_trainer(folder, devices=2, strategy="ddp", limit_val_batches=0)
    trainer.fit(task, Given([training_batch(2, 1), training_batch(0, 0)]))
    assert trainer.global_step == 1
    return task.state_dict()


def error_of_failing_scores() -> str:
    metric = MeanAveragePrecision(masks=False)
    metric.add(*random_images(2, seed=0), torch.arange(2))
    if dist.get_rank() == 0:
        metric.rec_thresholds = "nonsense"  # type: ignore[assignment]
    try:
        metric.compute()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0")  # Lightning then starts no processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    own = (EVEN, ODD)[rank]
    results: dict[str, Any] = {
        "4 and 3": scores_of(own, masks=False),
        "masks of 4 and 3": scores_of(own, masks=True),
        "3 and 0": scores_of(range(3 * (1 - rank)), masks=False),
        "masks of 3 and 0": scores_of(range(3 * (1 - rank)), masks=True),
        "repeated and padded": scores_of(own, masks=False, padded=True),
        "nothing": scores_of((), masks=False),
        "error": error_of_failing_scores(),
        "tasks": results_of_tasks(Path(folder), devices=2, strategy="ddp"),
        "weights": weights_after_training(Path(folder)),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of the two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_two_processes(run_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("images", [7, 3])
@pytest.mark.parametrize("masks", [False, True])
def test_scores_of_two_processes_are_those_of_one(both: list[dict[str, Any]], images: int, masks: bool) -> None:
    name = ("masks of " if masks else "") + {7: "4 and 3", 3: "3 and 0"}[images]
    expected = scores_of(range(images), masks=masks)
    assert 0 < expected.overall["map"] < 1
    assert [results[name] for results in both] == [expected, expected]


def test_images_that_come_twice_or_fill_up_count_once(both: list[dict[str, Any]]) -> None:
    assert [results["repeated and padded"] for results in both] == [scores_of(range(7), masks=False)] * 2


def test_an_epoch_without_images_has_no_scores(both: list[dict[str, Any]]) -> None:
    assert [results["nothing"] for results in both] == [Scores({}, {})] * 2


def test_an_error_of_the_first_process_reaches_both(both: list[dict[str, Any]]) -> None:
    first, second = (results["error"] for results in both)
    assert first == second != "none"


def test_the_results_of_a_task_are_those_of_one_process(both: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = results_of_tasks(tmp_path)
    assert 0.1 < expected["validate"]["val/map"] < 0.9
    assert expected["test"]["test/map"] != expected["validate"]["val/map"]
    assert expected["losses"]["val/loss"] > 0
    for results in both:
        assert results["tasks"]["validate"] == expected["validate"]
        assert results["tasks"]["test"] == expected["test"]
        assert results["tasks"]["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_a_process_without_objects_trains_with_the_other(both: list[dict[str, Any]]) -> None:
    start = tiny_task().state_dict()
    first, second = (results["weights"] for results in both)
    trained = [name for name in start if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(first[name], second[name]) for name in trained)
    assert any(not torch.equal(first[name], start[name]) for name in trained)
