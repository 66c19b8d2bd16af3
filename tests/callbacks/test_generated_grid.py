"""GeneratedGrid: whose weights, whose random numbers, what is drawn where."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from dia_lightning.callbacks import EMA, GeneratedGrid, generated_grid
from dia_lightning.drawing import draw_table
from dia_lightning.tasks import DiffusionTask
from tests.callbacks.tiny_classifier import NAMES, TinyData, TinyTask, tiny_trainer
from tests.two_processes import on_two_processes

State = dict[str, Tensor]


def state_of(task: LightningModule) -> State:
    return {name: value.clone() for name, value in task.state_dict().items() if name.startswith("backbone")}


class Generator(DiffusionTask):
    """A tiny network that notes what it is asked for and with which weights."""

    def __init__(self, classes: int | None = 3, **options: Any) -> None:
        torch.manual_seed(0)
        network = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.5}
        super().__init__(
            "unet",
            classes,
            image_shape=[1, 8, 8],
            backbone_args=network,
            conditional=classes is not None,
            lr=0.1,
            **options,
        )
        self.asked: list[dict[str, Any]] = []
        self.weights: list[State] = []

    def sample(self, count: int, **options: Any) -> Tensor:
        self.asked.append({"count": count, "grad": torch.is_grad_enabled(), **options})
        self.weights.append(state_of(self))
        return super().sample(count, **options)


class Last(Callback):
    """Keeps the weights that the last training step left, and the modes of the modules at its beginning."""

    def __init__(self) -> None:
        self.trained: State = {}
        self.modes: set[bool] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.modes |= {module.training for module in pl_module.backbone.modules()}  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.trained = state_of(pl_module)


def grid_of(**options: Any) -> GeneratedGrid:
    return GeneratedGrid(**{"num_images": 6, "steps": 4, **options})


def fit(folder: Path, task: LightningModule, *callbacks: Callback, **options: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = tiny_trainer(folder, *callbacks, **{"max_epochs": 2, **options})
    trainer.fit(task, datamodule=TinyData())
    return trainer


def test(folder: Path, task: LightningModule, grid: GeneratedGrid) -> None:
    tiny_trainer(folder, grid).test(task, datamodule=TinyData(), verbose=False)


test.__test__ = False  # type: ignore[attr-defined]


def same(first: State, second: State) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def pictures(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder / "pictures")) for file in folder.rglob("step=*.png"))


# ---- weights and random numbers


@pytest.mark.parametrize("order", [1, -1], ids=["average first", "average last"])
def test_samples_come_from_the_average_whatever_the_order_of_the_callbacks(tmp_path: Path, order: int) -> None:
    task, last = Generator(), Last()
    fit(tmp_path, task, *[EMA(decay=0.9, warmup=False), grid_of(), last][::order])
    # when a fit ends, the model holds the average, and the last validation comes after the last step
    assert same(task.weights[-1], state_of(task))
    assert not same(task.weights[-1], last.trained)


def test_without_an_average_samples_come_from_the_trained_weights(tmp_path: Path) -> None:
    task, last = Generator(), Last()
    fit(tmp_path, task, grid_of(), last)
    assert same(task.weights[-1], last.trained)


class Careless(Generator):
    """Uses up random numbers of everybody while it samples."""

    def sample(self, count: int, **options: Any) -> Tensor:
        torch.rand(7)
        np.random.rand()
        return super().sample(count, **options)


class Shuffled(TinyData):
    """Draws the order of the images from the global random numbers."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(super().train_dataloader().dataset, batch_size=4, shuffle=True)


@pytest.mark.parametrize("kind", [Generator, Careless])
def test_training_itself_is_not_changed(tmp_path: Path, kind: type[Generator]) -> None:
    results = []
    for callbacks in ([], [grid_of()]):
        task, last = kind(), Last()
        torch.manual_seed(0)
        tiny_trainer(tmp_path, *callbacks, last, max_epochs=2).fit(task, datamodule=Shuffled())
        results.append((state_of(task), torch.get_rng_state()))
        assert last.modes == {True}
    assert len(task.asked) == 2
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_samples_are_made_without_gradients_from_the_same_noise_each_time(tmp_path: Path) -> None:
    task = Generator(classes=None)
    fit(tmp_path, task, grid_of(seed=5, sampler="dpm++", steps=3), inference_mode=False)
    expected = {"count": 6, "classes": None, "steps": 3, "guidance": 1.0, "sampler": "dpm++", "seed": 5, "grad": False}
    assert task.asked == [expected, expected]


# ---- when, and which images


def test_only_every_nth_epoch_is_drawn_and_sanity_checking_is_not(tmp_path: Path) -> None:
    fit(tmp_path, Generator(), grid_of(every_n_epochs=2), max_epochs=4, num_sanity_val_steps=2)
    assert pictures(tmp_path) == ["val/samples/step=000012.png", "val/samples/step=000024.png"]


@pytest.mark.parametrize("trace", [True, False])
def test_a_test_draws_samples_and_if_asked_the_denoising_of_the_first_row(tmp_path: Path, trace: bool) -> None:
    task = Generator()
    test(tmp_path, task, grid_of(trace=trace))
    assert pictures(tmp_path) == ["test/denoising/step=000000.png"] * trace + ["test/samples/step=000000.png"]
    assert [asked["classes"] for asked in task.asked] == [[0, 1, 2, 0, 1, 2], [0, 1, 2]][: 1 + trace]


@pytest.mark.parametrize(
    ("classes", "images", "shown", "rows"),
    [(3, 40, [0, 1, 2], 13), (3, 2, [0, 1], 1), (100, 40, list(range(0, 100, 5)), 2)],
    ids=["incomplete rows", "more classes than images", "many classes"],
)
def test_each_class_has_a_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, classes: int, images: int, shown: list[int], rows: int
) -> None:
    calls = record_tables(monkeypatch)
    names = [f"class {label}" for label in range(classes)]
    monkeypatch.setattr(Generator, "class_names", names)
    task = Generator(classes)
    test(tmp_path, task, grid_of(num_images=images, trace=False))
    assert task.asked[0]["classes"] == shown * rows
    ((table, _, options),) = calls
    assert options["headings"] == [names[label] for label in shown]
    assert [len(row) for row in table] == [len(shown)] * rows


def record_tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[Tensor]], str, dict[str, Any]]]:
    calls = []

    def record(rows: list[list[Tensor]], title: str, **options: Any) -> Image.Image:
        calls.append((rows, title, options))
        return draw_table(rows, title, **options)

    monkeypatch.setattr(generated_grid, "draw_table", record)
    return calls


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 20), ("ddpm", 4), ("dpm++", 15)])
def test_strips_are_labelled_with_the_timesteps_of_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sampler: Any, steps: int
) -> None:
    calls = record_tables(monkeypatch)
    task = Generator(prediction="sample")
    # a network that takes everything for an image as bright as the timestep is late
    task.backbone.register_forward_hook(
        lambda _, args, output: type(output)(torch.ones_like(args[0]) * args[1].reshape(-1, 1, 1, 1) / 1000)
    )
    test(tmp_path, task, grid_of(sampler=sampler, steps=steps))
    (_, title, _), (strips, _, options) = calls
    assert title == f"test: 6 samples, {steps} steps of {sampler}"
    assert options["names"] == NAMES
    assert len(strips) == 3
    labels = [int(heading.removeprefix("t = ")) for heading in options["headings"]]
    for strip in strips:
        assert [round((2 * float(image.mean()) - 1) * 1000) for image in strip] == labels
    assert len(labels) == min(8, steps)


def test_strips_end_with_the_images_of_the_first_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = record_tables(monkeypatch)
    test(tmp_path, Generator(), grid_of())
    (samples, *_), (strips, *_) = calls
    for image, strip in zip(samples[0], strips, strict=True):
        torch.testing.assert_close(strip[-1], image, rtol=0, atol=1e-4)


def test_the_title_names_epoch_and_guidance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = record_tables(monkeypatch)
    fit(tmp_path, Generator(), grid_of(guidance=1.5))
    assert [title for _, title, _ in calls] == [
        f"val: epoch {epoch}, 6 samples, 4 steps of ddim, guidance 1.5" for epoch in (0, 1)
    ]


# ---- faults


def test_a_task_that_makes_no_images_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a task with a method sample, which TinyTask has not"):
        fit(tmp_path, TinyTask(), grid_of())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 30}, "steps must divide the 1000 timesteps for sampler='ddim', got 30. Take 25 or 40"),
        ({"sampler": "euler"}, r"sampler must be one of ddim, ddpm, dpm\+\+, got 'euler'"),
        ({"guidance": 2.0}, r"GeneratedGrid: guidance=2.0 needs a conditional task"),
    ],
)
def test_options_that_do_not_fit_the_task_are_refused_before_training(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    task = Generator(classes=None)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, task, grid_of(**options))
    assert not task.trainer.global_step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 401}, "num_images must be from 1 to 400, got 401"),
        ({"every_n_epochs": 0}, "every_n_epochs must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratedGrid(**options)


def test_the_callback_can_be_copied_and_pickled() -> None:
    grid = grid_of()
    assert copy.deepcopy(grid).sampling.steps == pickle.loads(pickle.dumps(grid)).sampling.steps == 4


# ---- two processes


def test_of_two_processes_one_draws_and_both_end(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, grid_of(), EMA(), max_epochs=2, **on_two_processes())
    task = Generator()
    trainer.fit(task, datamodule=TinyData())
    trainer.test(task, datamodule=TinyData(), verbose=False)
    # the processes of the test know nothing of the steps of the fit
    assert pictures(tmp_path) == [
        "test/denoising/step=000000.png",
        "test/samples/step=000000.png",
        "val/samples/step=000003.png",
        "val/samples/step=000006.png",
    ]
