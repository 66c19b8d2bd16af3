"""The command `export` with data of the run: constant maps are folded, detectors compared on real images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from dia_lightning.cli.commands._exported_metadata import metadata_of
from dia_lightning.cli.commands._fold_constant_maps import _accuracy
from dia_lightning.tasks import ClassificationTask, load_task
from tests.cli.conftest import Run
from tests.cli.test_detection import trained_on_cells

__all__ = ["trained_on_cells"]  # a fixture


def silence(checkpoint: Path, *sites: str) -> None:
    """Let the features at some sites, and so what their maps are made of, be the same for all images."""
    saved = torch.load(checkpoint, weights_only=True)
    for site in sites:
        saved["state_dict"][f"backbone.{site}.weight"].zero_()
        saved["state_dict"][f"backbone.{site}.bias"].normal_(generator=torch.Generator().manual_seed(0))
    torch.save(saved, checkpoint)


def test_constant_maps_are_folded_before_the_file_is_written(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run_folder / "checkpoints" / "last.ckpt"
    silence(checkpoint, "layer1.0.bn3", "layer2.0.bn3", "layer3.0.bn3")
    run("export", str(checkpoint), "network.safetensors", "--fold-constant-maps", "1e-4", "--images", "20")
    printed = capsys.readouterr().out
    assert "layer1.0.bn3      0   0.00e+00  folded" in printed
    assert "3 of 3 sites folded at tolerance 0.0001; on 20 images: largest difference of the outputs" in printed
    assert "get_model(...), without attach(...)" in printed
    (accuracy,) = (line.rpartition("accuracy ")[2] for line in printed.splitlines() if "accuracy" in line)
    assert len(set(accuracy.split(" -> "))) == 1
    from safetensors import safe_open

    task = load_task(checkpoint)
    assert isinstance(task, ClassificationTask)
    with safe_open("network.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name in task.backbone.state_dict() if ".dia." not in name}
        metadata = file.metadata()
        weight = file.get_tensor("layer1.0.bn3.bias")
    assert json.loads(metadata["class_names"]) == [str(number) for number in range(10)]
    assert len(json.loads(metadata["mean"])) == len(json.loads(metadata["std"])) == 3
    assert metadata["input"].startswith("float32 [B, 3, 8, 8]; pixels in [0, 1]")
    assert metadata["output"].startswith("logits [B, K] of class_names; softmax")
    assert not torch.equal(weight, task.backbone.state_dict()["layer1.0.bn3.bias"])


def test_weights_of_a_network_with_some_attention_left_are_not_written(
    fails: Callable[..., str], run_folder: Path
) -> None:
    checkpoint = run_folder / "checkpoints" / "last.ckpt"
    silence(checkpoint, "layer1.0.bn3", "layer2.0.bn3")
    message = fails("export", str(checkpoint), "network.safetensors", "--fold-constant-maps", "1e-4")
    assert "weights alone fit no network that attach() makes after 2 of 3 sites were folded" in message
    assert not Path("network.safetensors").exists()


def test_a_network_without_constant_maps_is_exported_as_it_is(
    run: Run, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run_folder / "checkpoints" / "last.ckpt"
    run("export", str(checkpoint), "network.safetensors", "--fold-constant-maps", "0", "-c", "tiny.yaml")
    assert "0 of 3 sites folded at tolerance 0: the network is exported as it is" in capsys.readouterr().out
    from safetensors.torch import load_file

    weights = load_file("network.safetensors")
    network = load_task(checkpoint).get_submodule("backbone")
    torch.testing.assert_close(weights, dict(network.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fold-constant-maps", "-0.1"), "--fold-constant-maps must be in [0, 1)"),
        (("--fold-constant-maps", "nan"), "for example 0.01; got nan"),
        (("--fold-constant-maps", "0.1", "--images", "1"), "--images must be 2 or more, got 1"),
        (("--fold-constant-maps", "0.1", "-c", "nowhere.yaml"), "nowhere.yaml is not there"),
        (("--root", "data"), "--root is for --fold-constant-maps and for detectors"),
    ],
)
def test_mistakes_are_one_line(
    fails: Callable[..., str], run_folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    checkpoint = str(run_folder / "checkpoints" / "last.ckpt")
    assert message in fails("export", checkpoint, "n.safetensors", *arguments)


def test_an_untrained_network_has_no_data(fails: Callable[..., str]) -> None:
    message = fails("export", "resnet164", "n.safetensors", "--fold-constant-maps", "0.1")
    assert "resnet164 is not trained, and there are no data to measure its maps on. Give a checkpoint" in message


@pytest.mark.parametrize(("kind", "expected"), [("binary", 0.75), ("multilabel", 0.5)])
def test_the_accuracy_is_that_of_the_kind_of_labels(kind: Literal["binary", "multilabel"], expected: float) -> None:
    task = ClassificationTask(nn.Flatten(), 2, task=kind)
    logits = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]])
    labels = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0]])
    if kind == "binary":
        logits, labels = logits[:, :1], torch.tensor([1, 1, 0, 1])
    assert _accuracy(task, [(logits[:3], labels[:3]), (logits[3:], labels[3:])]) == expected
    assert "softmax" not in metadata_of(task, (3, 8, 8))["output"]


@pytest.mark.slow
def test_a_detector_is_compared_on_images_of_its_run(
    trained_on_cells: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run("export", "last", "cells.onnx", "--fold-constant-maps", "0.9", "--images", "2")
    printed = capsys.readouterr().out
    assert "of 3 sites folded" in printed
    assert "mAP" in printed
    assert "objects in 2 images; largest difference: boxes" in printed
    session = onnxruntime.InferenceSession("cells.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    task = load_task(next(trained_on_cells.rglob("last.ckpt")))
    assert json.loads(metadata["category_ids"]) == task.category_ids
    assert json.loads(metadata["class_names"]) == task.class_names
    names: dict[str, object] = {"image": torch.rand(3, 50, 70).numpy()}
    exec(printed.partition("\n\nimport")[2].join(["import", ""]), names)
    assert {"boxes", "labels", "scores"} <= set(names)
    (trained_on_cells / "cells" / "instances_val.json").unlink(missing_ok=True)
    run("export", "last", "weights.safetensors")
    assert "compared on random images" in capsys.readouterr().err
