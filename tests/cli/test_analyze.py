"""The command `analyze`."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from PIL import Image

from dia_lightning.analysis import MapRecorder, Protocol, map_correlation
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.tasks import ClassificationTask, load_task
from tests.cli.conftest import CONFIG, Run, call

Fails = Callable[..., str]
PICTURES = ["gates", "gradients", "importance", "relative_change"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose stages have two layers each; tests work on copies."""
    folder = tmp_path_factory.mktemp("deeper")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("tiny.yaml").write_text(CONFIG.replace("{depth: 11}", "{depth: 14, block: basic}"))
        call("fit", "-c", "tiny.yaml", "--model.attention", "se", "--model.share", "block")
    return folder / "runs"


@pytest.fixture
def run_folder(deeper: Path, workplace: Path) -> Path:
    shutil.copytree(deeper, workplace / "runs")
    return workplace / "runs" / "tiny" / "version_0"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of a GPU round in their own way."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def result_of(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


def rewrite_config(run_folder: Path, **data: Any) -> None:
    path = run_folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"] |= data
    path.write_text(yaml.safe_dump(config))


# ---- results


def test_tables_numbers_and_pictures_are_written_to_the_run(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("analyze", "last")
    folder = run_folder / "analysis"
    names = [*(f"correlation_{name}" for name in PROTOCOLS), *PICTURES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["report.md", "result.json", *(f"{name}.png" for name in names)]
    )
    for name in names:
        assert min(Image.open(folder / f"{name}.png").size) > 200
    out, err = capsys.readouterr()
    assert "analyzing" not in err  # no terminal
    assert "the paper's protocol is not known" in out
    assert f"report.md, result.json and pictures: {folder.relative_to(Path.cwd())}" in out
    report = (folder / "report.md").read_text()
    assert all(f"]({name}.png)" in report for name in names)
    assert "is not known, so these numbers cannot be compared with it" in report
    assert "| 2 | layer3.1.bn2 |" in report


def test_the_numbers_are_those_of_the_recorder(run: Run, run_folder: Path) -> None:
    run("analyze", "best", "--split", "val", "--images", "15", "--out", "here")
    task = load_task(next((run_folder / "checkpoints").glob("best*")))
    assert isinstance(task, ClassificationTask)
    data = DigitsDataModule(image_size=8, batch_size=10, limit=20)
    with MapRecorder(task.backbone) as recorder, torch.no_grad():
        for images, _, _ in data.evaluation_dataloader("val", count=15):
            task.backbone(images)
    result = result_of(Path("here"))
    assert result["subject"]["images"] == 15
    for name in PROTOCOLS:
        of_stages = map_correlation(recorder.stages, name)
        for found, wanted in zip(result["correlations"][name], of_stages, strict=True):
            assert found["mean"] == pytest.approx(wanted.mean)
            assert found["interval"] == pytest.approx(wanted.interval)
            assert found["matrix"][0][1] == pytest.approx(wanted.matrix[0, 1].item())
    assert result["gradients"]["blocks"] == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    assert result["change"]["mean"][2] is None  # changes the shape
    assert all(len(stage["mean"]) == 2 for stage in result["gates"])


def test_nothing_is_overwritten_and_the_seed_gives_the_same(run: Run, run_folder: Path) -> None:
    run("analyze", "last")
    run("analyze", "last")
    run("analyze", "last", "--seed", "1")
    first, again, other = (result_of(run_folder / name) for name in ("analysis", "analysis-v1", "analysis-v2"))
    assert first == again
    assert first["mean_correlations"]["pooled"]["mean"] == other["mean_correlations"]["pooled"]["mean"]
    assert first["mean_correlations"]["pooled"]["interval"] != other["mean_correlations"]["pooled"]["interval"]


def test_the_recommendation_is_an_option_of_fit(run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    for name, weight in state["state_dict"].items():
        if ".layer2." in name and ".dia." in name:  # both units of a stage now give the same to every channel ...
            weight.zero_()
            if name.endswith("bias") and weight.numel() >= 32:
                weight.copy_(torch.linspace(-1, 1, len(weight)))  # ... but not the same to all channels
    torch.save(state, "alike.ckpt")
    run("analyze", "alike.ckpt", "-c", str(run_folder / "config.yaml"), "--out", "here", "--threshold", "0.99")
    plug = result_of(Path("here"))["recommendation"]["plug"]
    assert plug.split("|")[1] == "11"
    assert f'--model.share stage --model.plug "{plug}"' in capsys.readouterr().out
    options = ("--trainer.max_epochs", "1", "--model.share", "stage", "--model.plug", plug)
    run("fit", "-c", str(run_folder / "config.yaml"), *options, "--trainer.fast_dev_run", "true")


@pytest.mark.parametrize(
    "options", [["--model.plug", "11|10|01", "--model.share", "block"], ["--model.share", "stage"]]
)
def test_only_a_unit_in_every_block_gets_a_recommendation(run: Run, workplace: Path, options: list[str]) -> None:
    (workplace / "tiny.yaml").write_text(CONFIG.replace("{depth: 11}", "{depth: 14, block: basic}"))
    run("fit", "-c", "tiny.yaml", *options)
    run("analyze", "last", "--out", "here")
    result = result_of(Path("here"))
    assert result["recommendation"] is None
    single = "--model.plug" in options
    assert (result["correlations"]["pooled"][1]["mean"] is None) == single  # of a single layer
    assert "needs a network with a separate unit in every block" in Path("here/report.md").read_text()


def test_stages_of_one_layer_have_no_importance(run: Run, trained: Path, workplace: Path) -> None:
    shutil.copytree(trained / "runs", workplace / "runs")
    run("analyze", "last", "--out", "here")
    assert not Path("here/importance.png").exists()
    assert result_of(Path("here"))["mean_correlations"]["pooled"]["mean"] is None


def test_numbers_are_strict_json(run: Run, run_folder: Path) -> None:
    run("analyze", "last", "--out", "here")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    result = json.loads(Path("here/result.json").read_text(), parse_constant=refuse)
    assert all(math.isfinite(value) for value in result["gradients"]["mean"])


def test_a_terminal_sees_the_progress(
    run: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run("analyze", "last")
    assert "2/2" in capsys.readouterr().err


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--images 1", "--images must be 2 or more, got 1"),
        ("--seed -1", "--seed must be 0 or more, got -1"),
        ("--threshold 1.5", "--threshold must be above 0 and at most 1, got 1.5"),
        ("--out tiny.yaml", "--out tiny.yaml exists already"),
        ("--out tiny.yaml/here", "tiny.yaml/here cannot be made (Not a directory)"),
        ("--device cuda", "--device cuda: torch sees no GPU here"),
        ("-c nowhere.yaml", "nowhere.yaml is not there, so the data of the run are unknown"),
        ("-c broken.yaml", "broken.yaml is no YAML"),
        ("-c twice.yaml", "data is given twice"),
        ("-c empty.yaml", "empty.yaml has no section 'data'"),
        ("-c tiny.yaml -c empty.yaml", "-c tiny.yaml -c empty.yaml: with a checkpoint only the data of one config"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run_folder: Path, fails: Fails, options: str, message: str) -> None:
    Path("broken.yaml").write_text("data: [")
    Path("twice.yaml").write_text("data: {}\ndata: {}")
    Path("empty.yaml").write_text("model: {}")
    assert message in fails("analyze", "last", *options.split())
    assert not list(Path.cwd().rglob("analysis*"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"class_path": "os.system"}, "the data module 'os.system' is none of CIFAR"),
        ({"class_path": "mine.DigitsDataModule"}, "the data module 'mine.DigitsDataModule' is none of"),
        (
            {"class_path": "DigitScenesDataModule", "init_args": {}},
            "the data module 'DigitScenesDataModule' is none of CIFAR10DataModule, CIFAR100DataModule, "
            "DigitsDataModule, FashionMNISTDataModule, ImageFolderDataModule, ImageTableDataModule, STL10DataModule. "
            "Give a config with one of them, which ClassificationTask takes: -c CONFIG.",
        ),
        ({"init_args": {"image_sise": 8}}, "the options of DigitsDataModule do not fit"),
        ({"init_args": {"image_size": 4}}, "image_size must be"),
        ({"init_args": {"image_size": 16}}, "trained on images of shape [3, 8, 8], but the data have [3, 16, 16]"),
        (
            {"class_path": "FashionMNISTDataModule", "init_args": {"root": "nowhere", "download": False}},
            "nowhere",
        ),
    ],
)
def test_data_that_do_not_suit_are_one_line(run_folder: Path, fails: Fails, data: Any, message: str) -> None:
    rewrite_config(run_folder, **data)
    assert message in fails("analyze", "last")
    assert not list(Path.cwd().rglob("analysis*"))


def test_other_classes_are_refused(run_folder: Path, fails: Fails, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "1.png")
    rewrite_config(run_folder, class_path="ImageFolderDataModule", init_args={"root": "images", "image_size": 8})
    assert "trained on classes [0, 1, 2, 3, 4, ... 10 in all], but the data have [cat, dog]" in fails("analyze", "last")


def test_a_plain_network_is_refused(run: Run, workplace: Path, fails: Fails) -> None:
    run("fit", "-c", "tiny.yaml", "--model.attention", "null")
    assert "has no attention, so there is nothing to analyze" in fails("analyze", "last")


def test_a_network_that_diverged_is_said(run_folder: Path, fails: Fails) -> None:
    path = run_folder / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    next(iter(state["state_dict"].values())).fill_(math.nan)
    torch.save(state, path)
    assert "not finite: its weights or the images are broken" in fails("analyze", "last")
