"""The command `analyze` for every task, from a config, and its loggers."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from dia_lightning.analysis import MapRecorder, gradient_flow, map_correlation, without_shortcuts
from dia_lightning.datamodules import CocoDetectionDataModule, DigitsDataModule
from dia_lightning.tasks import ClassificationTask, DetectionTask, DiffusionTask, load_task
from tests.cli.conftest import CONFIG, Run, call
from tests.cli.test_detection import CONFIG as DETECTION
from tests.datamodules.tiny_detection import write_coco

Fails = Callable[..., str]

DIFFUSION = (
    CONFIG.replace("ClassificationTask", "DiffusionTask")
    .replace("backbone: cifar_resnet", "backbone: unet")
    .replace("{depth: 11}", "{block_out_channels: [8, 16], layers_per_block: 1, norm_num_groups: 4}")
    .replace("{image_size: 8,", "{image_size: 8, channels: 1, pixel_range: symmetric,")
    .replace("monitor: val/acc, mode: max", "monitor: val/loss, mode: min")
)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of a GPU round in their own way."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a diffusion task and a detector have run; tests work on copies."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_coco(folder / "cells")
        Path("cells.yaml").write_text(yaml.safe_dump(DETECTION))
        Path("draw.yaml").write_text(DIFFUSION)
        call("fit", "-c", "cells.yaml", "--trainer.callbacks", "null")
        call("fit", "-c", "draw.yaml")
    return folder


@pytest.fixture
def both(trained_once: Path, workplace: Path) -> Path:
    shutil.copytree(trained_once, workplace, dirs_exist_ok=True)
    return workplace


def result_of(folder: Path | str) -> Any:
    return json.loads((Path(folder) / "result.json").read_text())


def newest(pattern: str) -> Path:
    return max(Path("runs").glob(pattern))


# ---- tasks


def test_a_diffusion_task_is_analyzed_with_the_noise_of_its_validation(run: Run, both: Path) -> None:
    checkpoint = newest("tiny/version_0/checkpoints/last*.ckpt")
    run("analyze", str(checkpoint), "--images", "15", "--out", "here")
    result, report = result_of("here"), Path("here/report.md").read_text()
    task = load_task(checkpoint)
    assert isinstance(task, DiffusionTask)
    data = DigitsDataModule(image_size=8, channels=1, pixel_range="symmetric", batch_size=10, limit=20)
    batches = list(data.evaluation_dataloader("test", count=15))
    with MapRecorder(task.backbone) as recorder, torch.no_grad():
        for images, labels, index in batches:
            task.losses(images, labels, *task.evaluation_noise(images, index))
    for found, wanted in zip(result["correlations"]["pooled"], map_correlation(recorder.stages, "pooled"), strict=True):
        torch.testing.assert_close(
            torch.tensor(found["matrix"]), wanted.matrix, rtol=1e-5, atol=1e-6, check_dtype=False
        )
    first = next(iter(data.evaluation_dataloader("test", count=10)))  # one batch, in the shares of the classes
    flow = gradient_flow(task.backbone, lambda: task.evaluation_loss(first))
    assert result["gradients"]["blocks"] == flow.blocks
    assert result["gradients"]["mean"] == pytest.approx(flow.mean.tolist(), rel=1e-4)
    assert result["subject"]["images"] == 15
    assert result["without_shortcuts"] is None
    assert "The maps of a diffusion network depend on the timestep" in report
    assert "Gradients without shortcuts are not available for this network" in report


def test_a_detector_is_analyzed_by_the_maps_and_gradients_of_its_backbone(run: Run, both: Path) -> None:
    checkpoint = newest("cells/version_0/checkpoints/*.ckpt")
    run("analyze", str(checkpoint), "--out", "here")
    result, report = result_of("here"), Path("here/report.md").read_text()
    task = load_task(checkpoint)
    assert isinstance(task, DetectionTask)
    options: dict[str, Any] = DETECTION["data"]["init_args"]  # type: ignore[index]
    data = CocoDetectionDataModule(**options)
    batches = list(data.evaluation_dataloader("test"))
    body: Any = task.detector.backbone.body  # type: ignore[union-attr]
    loss = lambda: task.evaluation_loss(batches[0])  # noqa: E731
    flow = gradient_flow(body, loss)
    with without_shortcuts(body):
        without = gradient_flow(body, loss)
    assert result["gradients"]["blocks"] == flow.blocks == ["layer1.0", "layer2.0", "layer3.0"]
    assert result["gradients"]["mean"] == pytest.approx(flow.mean.tolist(), rel=1e-4)
    assert result["without_shortcuts"]["mean"] == pytest.approx(without.mean.tolist(), rel=1e-4)
    assert result["subject"]["images"] == sum(len(images) for images, *_ in batches)
    assert result["subject"]["detector"] == "fasterrcnn"
    assert "the network is the backbone of the detector" in report
    assert "| block | gradient | gradient without shortcuts | change |" in report


def test_data_of_another_kind_of_task_are_refused(fails: Fails, both: Path) -> None:
    checkpoint = newest("cells/version_0/checkpoints/*.ckpt")
    message = fails("analyze", str(checkpoint), "-c", "draw.yaml")
    assert "draw.yaml: the data module 'DigitsDataModule' is none of CocoDetectionDataModule" in message
    assert "which DetectionTask takes: -c CONFIG." in message


# ---- from a config


def test_without_a_checkpoint_the_network_is_that_which_fit_begins_with(run: Run, workplace: Path) -> None:
    Path("seeded.yaml").write_text(f"seed_everything: 7\n{CONFIG}")
    run("analyze", "-c", "seeded.yaml", "--images", "10")
    result = result_of("runs/analysis")
    assert (result["checkpoint"], result["config"]) == (None, "seeded.yaml")
    assert "Network as `seeded.yaml` builds it, not trained here" in Path("runs/analysis/report.md").read_text()
    data = DigitsDataModule(image_size=8, batch_size=10, limit=20)
    torch.manual_seed(7)
    task = ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}, attention="dia-lstm").eval()
    (batch,) = data.evaluation_dataloader("test", count=10)
    flow = gradient_flow(task.backbone, lambda: task.evaluation_loss(batch))
    assert result["gradients"]["mean"] == pytest.approx(flow.mean.tolist(), rel=1e-5)


def test_configs_are_merged_as_in_fit(run: Run, workplace: Path) -> None:
    Path("more.yaml").write_text("model: {init_args: {attention: eca, share: block}}")
    run("analyze", "-c", "tiny.yaml", "-c", "more.yaml", "--images", "10", "--out", "here")
    subject = result_of("here")["subject"]
    assert (subject["attention"], subject["share"]) == ("eca", "block")


def test_gradients_are_of_a_batch_in_the_shares_of_the_classes(run: Run, workplace: Path) -> None:
    Path("more.yaml").write_text("data: {init_args: {limit: 200, eval_batch_size: 20}}")
    run("analyze", "-c", "tiny.yaml", "-c", "more.yaml", "--images", "30", "--out", "here")
    data = DigitsDataModule(image_size=8, batch_size=10, eval_batch_size=20, limit=200)
    (batch,) = data.evaluation_dataloader("test", count=20)
    assert len(batch[1].unique()) == 10
    result = result_of("here")
    assert result["subject"]["gradient_images"] == 20
    torch.manual_seed(0)
    task = ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}, attention="dia-lstm").eval()
    flow = gradient_flow(task.backbone, lambda: task.evaluation_loss(batch))
    assert result["gradients"]["mean"] == pytest.approx(flow.mean.tolist(), rel=1e-5)


def test_a_config_may_start_from_weights_and_a_run_of_training_gets_no_say(run: Run, trained: Path, both: Path) -> None:
    shutil.copytree(trained / "runs" / "tiny", "other")
    checkpoint = next(Path("other/version_0/checkpoints").glob("last*.ckpt"))
    config = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["init_from"] = str(checkpoint)
    config["trainer"] |= {"accelerator": "gpu", "devices": 8, "strategy": "ddp"}  # of another machine
    Path("from.yaml").write_text(yaml.safe_dump(config))
    run("analyze", "-c", "from.yaml", "--out", "built")
    run("analyze", str(checkpoint), "--out", "loaded")
    assert result_of("built")["gradients"] == result_of("loaded")["gradients"]
    assert result_of("built")["mean_correlations"] == result_of("loaded")["mean_correlations"]


@pytest.mark.parametrize("name", ["draw.yaml", "cells.yaml"])
def test_every_task_can_be_built_from_a_config(run: Run, both: Path, name: str) -> None:
    run("analyze", "-c", name, "--out", "here")
    assert result_of("here")["subject"]["share"] == "stage"


def test_root_is_that_of_the_data(run: Run, fails: Fails, both: Path) -> None:
    Path("cells").rename("moved")
    assert "cells" in fails("analyze", "-c", "cells.yaml", "--out", "here")
    run("analyze", "-c", "cells.yaml", "--root", "moved", "--out", "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "There is nothing to analyze: give a checkpoint ('best', 'last', a file) or -c CONFIG."),
        ("-c nowhere.yaml", "There is no file nowhere.yaml."),
        ("-c wrong.yaml", "ClassificationTask has no such option"),
        ("-c plain.yaml", "The network of plain.yaml has no attention"),
        ("-c tiny.yaml --out tiny.yaml", "--out tiny.yaml exists already"),
    ],
)
def test_mistakes_with_configs_are_one_line(workplace: Path, fails: Fails, options: str, message: str) -> None:
    Path("wrong.yaml").write_text(CONFIG.replace("attention:", "attentoin:"))
    Path("plain.yaml").write_text(CONFIG.replace("attention: dia-lstm", "attention: null"))
    assert message in fails("analyze", *options.split())
    assert not list(Path.cwd().rglob("analysis*"))


# ---- loggers


def test_loggers_get_pictures_tables_and_numbers(run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("analyze", "-c", "tiny.yaml", "--images", "15", "--out", "here", "--log", "wandb", "--log", "tensorboard")
    pictures = {path.stem: Image.open(path).size for path in Path("here").glob("*.png")}
    (media,) = Path("here").glob("wandb/offline-run-*/files/media")
    sent = {path.name.rsplit("_", 2)[0]: Image.open(path).size for path in media.glob("images/analysis/*.png")}
    assert sent == pictures
    tables = {path.name.rsplit("_", 2)[0]: json.loads(path.read_text()) for path in media.glob("table/analysis/*.json")}
    assert tables.keys() == {"correlations", "layers", "blocks"}
    result = result_of("here")
    blocks = tables["blocks"]
    assert blocks["columns"] == ["block", "gradient", "gradient without shortcuts", "change"]
    assert [row[0] for row in blocks["data"]] == result["gradients"]["blocks"]
    assert [row[1] for row in blocks["data"]] == pytest.approx(result["gradients"]["mean"])
    assert [row[2] for row in blocks["data"]] == pytest.approx(result["without_shortcuts"]["mean"])

    events = EventAccumulator("here/tensorboard").Reload()
    assert set(events.Tags()["images"]) == {f"analysis/{name}" for name in pictures}
    (scalar,) = events.Scalars("analysis/gradient/first_block")
    assert scalar.value == pytest.approx(result["gradients"]["mean"][0])
    (text,) = events.Tensors("analysis/report/text_summary")
    assert b"# What the attention does" in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_said_before_the_work(
    workplace: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("dia_lightning.cli.commands._send_analysis.find_spec", lambda kind: None)
    message = fails("analyze", "-c", "tiny.yaml", "--log", name)
    assert f"--log {name} needs the package {name}, which is not installed. Install it (pip install {name})" in message
    assert not Path("runs").exists()


def test_a_service_that_does_not_answer_is_done_without(
    workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = wandb.init

    def refuse(**options: Any) -> Any:
        if options.get("mode") == "offline":
            return begin(**options)
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.warns(UserWarning, match=r"did not start online \(api_key not configured\)"):
        run("analyze", "-c", "tiny.yaml", "--images", "15", "--out", "here", "--log", "wandb")
    assert result_of("here")["subject"]["images"] == 15
    assert list(Path("here").glob("wandb/offline-run-*/files/media/images/analysis/*.png"))


def test_an_unknown_logger_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("analyze", "-c", "tiny.yaml", "--log", "mlflow")
    assert "mlflow" in capsys.readouterr().err
    assert "mlflow" not in sys.modules
