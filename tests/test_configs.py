"""Every shipped config runs through the program, on tiny data of its shape."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchvision import datasets

from dia_lightning.__main__ import main
from dia_lightning.attention import attach
from dia_lightning.models import get_model
from tests.datamodules import tiny_data, tiny_detection

CONFIGS = Path(__file__).parents[1] / "configs"
CLASSIFICATION = sorted((CONFIGS / "classification").glob("*.yaml"))
DETECTION = sorted((CONFIGS / "detection").glob("*.yaml"))
DIFFUSION = sorted((CONFIGS / "diffusion").glob("*.yaml"))  # they run in tests/cli/test_diffusion.py
OVERLAYS = sorted([*(CONFIGS / "logger").glob("*.yaml"), *(CONFIGS / "trainer").glob("*.yaml")])
DIGITS = CONFIGS / "classification" / "digits.yaml"
SMOKE = CONFIGS / "trainer" / "smoke.yaml"

# A network of the same family and interface, small enough for a test. The tests below count the real ones.
SMALL = {
    "resnet164": ("cifar_resnet", {"depth": 11}),
    "preresnet164": ("cifar_preresnet", {"depth": 11}),
    "wrn52_4": ("cifar_wrn", {"depth": 10, "widen_factor": 1, "dropout": 0.3}),
    "resnext101_8x32": ("cifar_resnext", {"depth": 11, "cardinality": 2, "base_width": 4}),
}
PARAMETERS = {
    "cifar100_resnet164": 1_946_132,
    "cifar100_preresnet164": 1_961_364,
    "cifar100_wrn52_4": 12_298_516,
    "cifar100_resnext101_8x32": 33_006_020,
}


def read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with a tiny data set for every data module below `data`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dia-lightning"])
    data = tmp_path / "data"
    data.mkdir()
    tiny_data.write_fashion_mnist(data, train=6000)
    tiny_data.write_image_folder(data)
    tiny_data.write_cifar(data, datasets.CIFAR100, monkeypatch)
    tiny_detection.write_coco(data, masks=True)
    tiny_detection.write_voc(data)
    return tmp_path


def tiny_options(config: dict[str, Any]) -> list[str]:
    options = ["--data.batch_size", "4", "--data.limit", "12", "--data.root", "data", "--data.num_workers", "0"]
    options += ["--trainer.enable_progress_bar", "false"]
    model = config["model"]["init_args"]
    if model["backbone"] in SMALL:
        name, args = SMALL[model["backbone"]]
        options += ["--model.backbone", name, "--model.backbone_args", str(args)]
    if model["backbone"].startswith("torchvision/"):
        options += ["--model.backbone", "torchvision/resnet18"]
    if model["backbone"].startswith("timm/"):
        options += ["--model.backbone", "timm/test_vit"]
    if {"weights", "pretrained"} & set(model.get("backbone_args", {})):
        options += ["--model.backbone_args", "null"]  # no download
    return options + (tiny_detector(config) if "detector" in model else tiny_images(model["backbone"]))


def tiny_images(backbone: str) -> list[str]:
    size = {"torchvision": "32", "timm": "160"}.get(backbone.partition("/")[0])
    return [] if size is None else ["--data.image_size", size]


def tiny_detector(config: dict[str, Any]) -> list[str]:
    sizes = {"min_size": 64, "max_size": 64, "fpn_channels": 16}
    if config["model"]["init_args"]["detector"] in ("fasterrcnn", "maskrcnn"):
        sizes |= {"representation_size": 32, "box_detections_per_img": 10}
    options = [f"--model.detector_args.{name}={value}" for name, value in sizes.items()]
    if config["data"]["class_path"] == "CocoDetectionDataModule":
        options += [f"--data.{name}={value}" for name, value in tiny_detection.BCCD_LAYOUT.items()]
    return options


@pytest.mark.parametrize("path", [*CLASSIFICATION, *DETECTION], ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_config_trains_and_tests(path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read(path)
    main(["fit", "-c", str(path), "-c", str(SMOKE), *tiny_options(config), "--model.lr", "0.003"])
    predictions = "detections.json" if path in DETECTION else "predictions.csv"
    run = Path("runs") / config["trainer"]["logger"][0]["init_args"]["name"] / "version_0"
    assert read(run / "config.yaml")["model"]["init_args"]["lr"] == 0.003  # the dotted override
    assert [file.name[:6] for file in (run / "checkpoints").glob("best-*.ckpt")] == ["best-e"]
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / predictions).is_file()
    assert list((run / "pictures").rglob("*.png"))
    printed = capsys.readouterr().out
    assert printed.count("Test metric") == 1
    assert str(run / predictions) in printed


@pytest.mark.parametrize("path", CLASSIFICATION, ids=lambda path: str(path.stem))
def test_config_describes_the_network_that_it_names(path: Path) -> None:
    model = read(path)["model"]["init_args"]
    with torch.device("meta"):
        fixed = {"weights": None} if "weights" in model.get("backbone_args", {}) else {"pretrained": False}
        arguments = model.get("backbone_args", {})
        network = get_model(model["backbone"], **{**arguments, **{k: v for k, v in fixed.items() if k in arguments}})
        attach(network, model["attention"], share=model["share"], **model.get("attention_args", {}))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == PARAMETERS.get(path.stem, count)
    if path.stem in PARAMETERS:
        assert f"{count:,} parameters" in path.read_text()


@pytest.mark.parametrize(
    ("name", "epochs", "milestones", "gamma", "weight_decay"),
    [
        ("cifar100_resnet164", 180, [60, 120], 0.1, 1e-4),
        ("cifar100_preresnet164", 164, [81, 122], 0.1, 1e-4),
        ("cifar100_wrn52_4", 200, [80, 120, 160], 0.2, 5e-4),
        ("cifar100_resnext101_8x32", 300, [150, 225], 0.1, 5e-4),
        ("imagenet_resnet34", 120, [30, 60, 90], 0.1, 1e-4),
        ("imagenet_resnet50", 120, [30, 60, 90], 0.1, 1e-4),
        ("imagenet_resnet152", 120, [30, 60, 90], 0.1, 1e-4),
        ("imagenet_resnext50", 120, [30, 60, 90], 0.1, 1e-4),
    ],
)
def test_config_is_the_authors_recipe(
    name: str, epochs: int, milestones: list[int], gamma: float, weight_decay: float
) -> None:
    config = read(CONFIGS / "classification" / f"{name}.yaml")
    model = config["model"]["init_args"]
    assert config["trainer"]["max_epochs"] == epochs
    assert (model["milestones"], model["gamma"], float(model["weight_decay"])) == (milestones, gamma, weight_decay)
    assert (model["optimizer"], model["lr"], model["momentum"], model["nesterov"]) == ("sgd", 0.1, 0.9, False)
    assert config["data"]["init_args"]["batch_size"] == (128 if name.startswith("cifar") else 256)


@pytest.mark.parametrize("path", [*CLASSIFICATION, *DETECTION, *DIFFUSION, *OVERLAYS], ids=lambda path: str(path.stem))
def test_config_names_its_own_command(path: Path) -> None:
    header = path.read_text().partition("\ntrainer:")[0]
    named = re.findall(r"configs/[\w/]+\.yaml", header)
    assert str(path.relative_to(CONFIGS.parent)) in named
    assert all((CONFIGS.parent / name).is_file() for name in named)


@pytest.mark.parametrize(
    "options",
    [
        ["--model.attention", "null"],
        ["--model.attention", "se", "--model.attention_args", "null"],
        ["--model.share", "block"],
    ],
    ids=["plain", "se", "block"],
)
@pytest.mark.parametrize(
    "name",
    [
        "classification/digits",
        "classification/cifar100_preresnet164",
        "classification/imagenet_resnet50",
        "detection/digits",
        "detection/coco_retinanet_resnet50",
    ],
)
def test_the_arms_to_compare_with_train(name: str, options: list[str], workplace: Path) -> None:
    path = CONFIGS / f"{name}.yaml"
    main(["fit", "-c", str(path), *tiny_options(read(path)), *options, "--trainer.fast_dev_run", "true"])


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: str(path.stem))
def test_overlay_goes_with_a_config(path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "-c", str(DIGITS), "-c", str(path), "--print_config"])
    assert exit_info.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["class_path"].endswith("DigitsDataModule")
    loggers = [logger["class_path"].rpartition(".")[2] for logger in config["trainer"]["logger"]]
    assert loggers[0] == "CSVLogger"
    assert len(loggers) == (2 if path.parent.name == "logger" else 1)
    for key, value in read(path)["trainer"].items():
        if not isinstance(value, (dict, list)):
            assert config["trainer"][key] == value


@pytest.mark.slow
def test_two_processes_predict_every_sample_once(workplace: Path) -> None:
    configs = ["-c", str(DIGITS), "-c", str(SMOKE), "-c", str(CONFIGS / "trainer" / "ddp.yaml")]
    options = [*tiny_options(read(DIGITS)), "--model.backbone_args.depth", "11", "--data.limit", "13"]  # an odd number
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    command = [sys.executable, "-m", "dia_lightning", "fit", *configs, *options, *devices]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert "with 2 processes" in result.stderr
    with open(workplace / "runs" / "digits" / "version_0" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["sample"] for row in rows}) == len(rows) == 13


@pytest.mark.parametrize("overlay", ["logger/tensorboard", "logger/wandb", "trainer/bf16"])
def test_overlay_runs(overlay: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = [*tiny_options(read(DIGITS)), "--model.backbone_args.depth", "11"]
    main(["fit", "-c", str(DIGITS), "-c", str(CONFIGS / f"{overlay}.yaml"), "-c", str(SMOKE), *options])
    assert (workplace / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt").is_file()
    if overlay == "logger/tensorboard":
        assert list((workplace / "runs" / "tensorboard").rglob("events.out.tfevents.*"))
    if overlay == "logger/wandb":
        import wandb

        wandb.finish()
        assert list((workplace / "runs" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("path", [*CLASSIFICATION, *DETECTION, *DIFFUSION], ids=lambda path: str(path.stem))
def test_config_keeps_the_newest_epoch_whether_it_was_validated_or_not(path: Path) -> None:
    last = [
        item["init_args"]
        for item in read(path)["trainer"]["callbacks"]
        if item.get("init_args", {}).get("filename") == "last"
    ]
    assert [item["save_on_train_epoch_end"] for item in last] == [True]
