"""The command `sample`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dia_lightning import drawing
from dia_lightning.callbacks import generated_grid
from dia_lightning.tasks import DIATask, DiffusionTask, load_task
from tests.cli.conftest import Run
from tests.tasks.conftest import small_task, small_trainer

NETWORK: dict[str, Any] = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
Fails = Callable[..., str]


def write_checkpoint(path: Path, task: DIATask) -> Path:
    trainer = small_trainer(path.parent)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return path


def tiny_task(*, channels: int = 1, names: tuple[str, ...] = ("cat", "dog", "0"), **options: Any) -> DiffusionTask:
    arguments: dict[str, Any] = {"conditional": True, "attention": "dia-lstm", "timesteps": 50, **options}
    task = DiffusionTask("unet", 3, image_shape=[channels, 8, 8], backbone_args=NETWORK, **arguments)
    task.on_load_checkpoint({"dia_data": {"class_names": list(names)}})
    return task


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_checkpoint(folder / "conditional.ckpt", tiny_task())
    write_checkpoint(folder / "unconditional.ckpt", tiny_task(channels=3, conditional=False))
    write_checkpoint(folder / "classes_only.ckpt", tiny_task(label_dropout=0.0))
    write_checkpoint(folder / "four_channels.ckpt", tiny_task(channels=4))
    write_checkpoint(folder / "classification.ckpt", small_task())
    return folder


@pytest.fixture
def checkpoint(written: Path, workplace: Path) -> str:
    """A checkpoint in a run folder of the working folder."""
    path = workplace / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    shutil.copy(written / "conditional.ckpt", path)
    return str(path)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of a GPU round in their own way."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def numbered(folder: str | Path) -> Any:
    return np.stack([pixels(path) for path in sorted(Path(folder).glob("0*.png"))])


def samples(checkpoint: str | Path, count: int, **options: Any) -> Any:
    """What the task itself makes, in 0..255."""
    task = load_task(checkpoint)
    assert isinstance(task, DiffusionTask)
    return (task.sample(count, **options) * 255).round().int().numpy()


def differ(first: Any, second: Any) -> bool:
    return first.shape != second.shape or bool(np.abs(first - second).max() > 1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the tables in pictures were made of."""
    tables: list[dict[str, Any]] = []
    draw = drawing.draw_table

    def note(rows: Any, title: str, **options: Any) -> Image.Image:
        values = [np.stack([image.numpy()[0].astype(int) for image in row]) for row in rows]
        tables.append({"rows": values, "title": title, **options})
        return draw(rows, title, **options)

    for module in (drawing, generated_grid):
        monkeypatch.setattr(module, "draw_table", note)
    return tables


# ---- images


def test_the_images_are_those_of_the_task(run: Run, checkpoint: str) -> None:
    run("sample", checkpoint, "--count", "5", "--steps", "5", "--seed", "3", "--guidance", "2", "--out", "here")
    files = [*[f"00000{i}.png" for i in range(5)], "classes.csv", "grid.png"]
    assert [path.name for path in sorted(Path("here").iterdir())] == files
    assert Image.open("here/000000.png").mode == "L"
    assert not differ(numbered("here"), samples(checkpoint, 5, steps=5, seed=3, guidance=2.0)[:, 0])


def test_colours_stay_colours(run: Run, written: Path) -> None:
    path = written / "unconditional.ckpt"
    run("sample", str(path), "--count", "2", "--steps", "3", "--sampler", "dpm++", "--out", "here")
    assert Image.open("here/000001.png").mode == "RGB"
    colours = pixels(Path("here/grid.png")).reshape(-1, 3)
    assert all((colours == colour).all(1).any() for colour in pixels(Path("here/000001.png")).reshape(-1, 3))
    wanted = samples(path, 2, steps=3, sampler="dpm++").transpose(0, 2, 3, 1)
    assert not differ(numbered("here"), wanted)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_the_batch_size_has_no_influence_and_the_seed_has(run: Run, checkpoint: str, sampler: str) -> None:
    options = ("--count", "7", "--steps", "5", "--sampler", sampler, "--classes", "dog", "cat", "--trace")
    for out, batch_size, seed in (("seven", "7", "0"), ("three", "3", "0"), ("one", "1", "0"), ("other", "7", "1")):
        run("sample", checkpoint, *options, "--batch_size", batch_size, "--seed", seed, "--out", out)
    for out in ("three", "one"):
        assert not differ(numbered(out), numbered("seven"))
        assert not differ(pixels(Path(out, "grid.png")), pixels(Path("seven/grid.png")))
        assert not differ(pixels(Path(out, "trace.png")), pixels(Path("seven/trace.png")))
    assert all(differ(*pair) for pair in zip(numbered("other"), numbered("seven"), strict=True))


# ---- classes


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["dog"], [1, 1, 1, 1]),
        (["1", "cat"], [1, 0, 1, 0]),
        (["0"], [2, 2, 2, 2]),  # the name of the last class
        ([], [0, 1, 2, 0]),
    ],
)
def test_classes_are_gone_round_by_name_or_number(
    run: Run, checkpoint: str, given: list[str], labels: list[int]
) -> None:
    run(
        "sample", checkpoint, *(["--classes", *given] if given else []), "--count", "4", "--steps", "2", "--out", "here"
    )
    assert not differ(numbered("here"), samples(checkpoint, 4, steps=2, classes=labels)[:, 0])


def test_without_a_class_the_class_is_ignored(run: Run, checkpoint: str, written: Path) -> None:
    run("sample", checkpoint, "--classes", "none", "--count", "3", "--steps", "2", "--out", "here")
    without = samples(checkpoint, 3, steps=2, guidance=0.0)[:, 0]
    assert not differ(numbered("here"), without)
    assert differ(samples(checkpoint, 3, steps=2)[:, 0], without)
    run("sample", str(written / "unconditional.ckpt"), "--classes", "none", "--count", "1", "--steps", "2")


# ---- pictures


def test_the_grid_has_a_column_per_class_in_the_order_of_the_files(
    run: Run, checkpoint: str, drawn: list[dict[str, Any]]
) -> None:
    run("sample", checkpoint, "--count", "7", "--steps", "2", "--batch_size", "2", "--guidance", "2", "--out", "here")
    (grid,) = drawn
    assert grid["headings"] == ["cat", "dog", "0"]
    assert [len(row) for row in grid["rows"]] == [3, 3, 1]
    assert (np.concatenate(grid["rows"]) == numbered("here")).all()
    assert grid["title"] == "7 samples, 2 steps of ddim, guidance 2, seed 0"
    assert Path("here/classes.csv").read_text().splitlines()[:3] == [
        "file,label,class",
        "000000.png,0,cat",
        "000001.png,1,dog",
    ]


def test_images_of_one_class_or_of_none_make_a_square(
    run: Run, checkpoint: str, written: Path, drawn: list[dict[str, Any]]
) -> None:
    run("sample", checkpoint, "--classes", "dog", "--count", "18", "--steps", "2", "--out", "dogs")
    run("sample", str(written / "unconditional.ckpt"), "--count", "4", "--steps", "2", "--out", "none")
    dogs, none = drawn
    assert [len(row) for row in dogs["rows"]] == [5, 5, 5, 3]
    assert dogs["title"].startswith("18 samples of dog, ")
    assert [len(row) for row in none["rows"]] == [2, 2]
    assert dogs["headings"] == none["headings"] == []
    assert not Path("none/classes.csv").exists()


def test_the_trace_has_a_strip_of_each_of_the_first_images(
    run: Run, checkpoint: str, drawn: list[dict[str, Any]]
) -> None:
    run("sample", checkpoint, "--count", "10", "--steps", "5", "--batch_size", "4", "--trace", "--out", "here")
    trace = drawn[1]
    wanted = samples(checkpoint, 8, steps=5, trace=True)[:, :, 0]
    assert not differ(np.stack(trace["rows"]), wanted)
    assert trace["headings"] == ["t = 40", "t = 30", "t = 20", "t = 10", "t = 0"]
    assert trace["names"] == ["cat", "dog", "0", "cat", "dog", "0", "cat", "dog"]
    assert Image.open("here/trace.png").size[0] > 5 * 48


# ---- files


def test_the_newest_run_gets_a_folder_per_call(run: Run, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        run("sample", "last", "--count", "1", "--steps", "2", "--seed", "4", "--trace")
    folder = Path("runs/tiny/version_0/samples")
    assert sorted(path.name for path in folder.iterdir()) == ["seed=4", "seed=4-v1", "seed=4-v2"]
    assert (numbered(folder / "seed=4") == numbered(folder / "seed=4-v2")).all()
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"1 image, grid.png and trace.png: {folder / 'seed=4-v2'}"
    assert "checkpoint runs/tiny/version_0/checkpoints/last.ckpt" in printed.err


def test_a_checkpoint_outside_a_run_has_the_samples_beside_it(run: Run, written: Path, workplace: Path) -> None:
    shutil.copy(written / "conditional.ckpt", "some.ckpt")
    run("sample", "some.ckpt", "--count", "1", "--steps", "2")
    assert Path("samples/seed=0/grid.png").is_file()


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--count 0", "--count must be 1 or more, got 0"),
        ("--batch_size 0", "--batch_size must be 1 or more, got 0"),
        ("--seed -1", "seed must be 0 or more, got -1"),
        ("--steps 0", "steps must divide the 50 timesteps for sampler='ddim', got 0"),
        ("--steps 7", "got 7. Take 5 or 10, or sampler='dpm++'"),
        ("--steps 50 --sampler dpm++", "steps must be from 1 to 49"),
        ("--classes 3", "--classes must be names of classes or in 0..2, got 3"),
        ("--classes cat -1", "--classes must be names of classes or in 0..2, got -1"),
        ("--classes dogg", "--classes dogg: the checkpoint knows no such class. Did you mean 'dog'?"),
        ("--classes none cat", "--classes none: the checkpoint knows no such class. Known: 0, cat, dog."),
        ("--classes none --guidance 2", "--guidance 2.0 leads to a class, but --classes none to none"),
        ("--guidance nan", "guidance must be a finite number, got nan"),
        ("--guidance 1e39", "The images are not finite"),
        ("--out tiny.yaml", "--out tiny.yaml exists already"),
        ("--out tiny.yaml/here", "tiny.yaml/here cannot be made (Not a directory)"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(checkpoint: str, fails: Fails, options: str, message: str) -> None:
    assert message in fails("sample", checkpoint, "--steps", "2", *options.split())
    assert not list(Path.cwd().rglob("*.png"))
    assert not list(Path.cwd().rglob("samples"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("classification", "", "holds a ClassificationTask"),
        ("four_channels", "", "makes images of 4 channels"),
        ("unconditional", "--classes 1", "--classes needs a conditional task"),
        ("unconditional", "--guidance 2", "guidance=2.0 needs a conditional task"),
        ("classes_only", "--classes none", "--classes none needs a task that was trained with label_dropout above 0"),
        ("nowhere", "", "nowhere.ckpt: there is no such file"),
    ],
)
def test_a_checkpoint_that_does_not_suit_is_one_line(
    written: Path, fails: Fails, name: str, options: str, message: str
) -> None:
    assert message in fails("sample", str(written / f"{name}.ckpt"), "--steps", "2", *options.split())


def test_classes_without_names_have_numbers(fails: Fails, workplace: Path) -> None:
    path = write_checkpoint(workplace / "nameless.ckpt", tiny_task(names=()))
    assert "it has no names. Give numbers in 0..2" in fails("sample", str(path), "--classes", "cat")


def test_a_missing_gpu_is_one_line(checkpoint: str, fails: Fails) -> None:
    assert "--device cuda: torch sees no GPU here" in fails("sample", checkpoint, "--device", "cuda")


def test_a_terminal_sees_every_run_of_the_network(
    run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("sample", checkpoint, "--count", "3", "--steps", "2")
    assert "sampling" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run("sample", checkpoint, "--count", "3", "--steps", "2", "--batch_size", "2", "--trace")
    assert "8/8" in capsys.readouterr().err
