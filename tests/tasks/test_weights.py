"""Starting from the weights of a file."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dia_lightning.models import get_model
from dia_lightning.tasks import load_task
from dia_lightning.tasks._weights import load_detector_weights, load_weights
from dia_lightning.tasks.detection import DetectionTask
from tests.tasks.conftest import small_task
from tests.tasks.tiny_detection import BACKBONE, tiny_task


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    torch.save(get_model("cifar_resnet", depth=11, num_classes=10).state_dict(), tmp_path / "plain.pth")
    return tmp_path / "plain.pth"


def test_plain_weights_go_into_a_network_with_attention(plain: Path) -> None:
    task = small_task(init_from=str(plain))
    own = task.backbone.state_dict()
    assert all(torch.equal(own[key], value) for key, value in torch.load(plain).items())


def test_safetensors_and_prefixed_weights_load(plain: Path, tmp_path: Path) -> None:
    weights = torch.load(plain)
    save_file(weights, tmp_path / "plain.safetensors")
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in weights.items()}}, tmp_path / "task.ckpt")
    torch.save({f"module.{key}": value for key, value in weights.items()}, tmp_path / "parallel.pth")
    torch.save({"model": {f"_orig_mod.{key}": value for key, value in weights.items()}}, tmp_path / "compiled.pth")
    for name in ("plain.safetensors", "task.ckpt", "parallel.pth", "compiled.pth"):
        network = get_model("cifar_resnet", depth=11, num_classes=10)
        load_weights(network, str(tmp_path / name))
        assert all(torch.equal(network.state_dict()[key], value) for key, value in weights.items()), name


def test_a_classifier_of_other_classes_keeps_its_start(plain: Path) -> None:
    network = get_model("cifar_resnet", depth=11, num_classes=3)
    before = network.fc.weight.clone()  # type: ignore[operator, union-attr]
    said = load_weights(network, str(plain))
    assert "the classifier keeps its initial values" in said
    assert torch.equal(network.fc.weight, before)  # type: ignore[arg-type, union-attr]
    assert torch.equal(network.state_dict()["conv1.weight"], torch.load(plain)["conv1.weight"])


def test_weights_of_another_network_are_refused(plain: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a different network: .* weights are missing"):
        load_weights(get_model("cifar_resnet", depth=20, num_classes=10), str(plain))
    with pytest.raises(ValueError, match="holds a different network"):
        load_weights(get_model("cifar_wrn", depth=10, widen_factor=4, num_classes=10), str(plain))


def test_what_is_no_weights_file_is_named(tmp_path: Path) -> None:
    network = get_model("cifar_resnet", depth=11, num_classes=10)
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.pth'"):
        load_weights(network, "nowhere.pth")
    with pytest.raises(ValueError, match=r"local files only, got 'https://example\.org/w\.pth'"):
        load_weights(network, "https://example.org/w.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.pth' is damaged or not a weights file"):
        load_weights(network, str(tmp_path / "page.pth"))
    torch.save(["no", "state"], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(network, str(tmp_path / "list.pth"))


def test_a_checkpoint_of_something_else_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'nowhere\.ckpt'"):
        load_task("nowhere.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is not a checkpoint of a dia-lightning task: .* weights"):
        load_task(tmp_path / "other.ckpt")
    later = {"dia_task": "SegmentationTask", "state_dict": {}, "hyper_parameters": {}}
    torch.save(later, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match="was written by SegmentationTask, which is not imported"):
        load_task(tmp_path / "later.ckpt")


def test_a_checkpoint_that_names_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("def optimizer(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "optimizer": "planted.optimizer"}
    task = small_task()
    checkpoint = {"dia_task": "ClassificationTask", "hyper_parameters": {**task.hparams, **named}}
    checkpoint |= {"state_dict": task.state_dict(), "pytorch-lightning_version": "2.6.6"}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"optimizer must be .*, got .planted\.optimizer"):
        load_task(tmp_path / "a.ckpt")
    assert "planted" not in sys.modules


@pytest.mark.parametrize("options", [{"identity": True}, {"share": "block"}, {"attention_args": {"cells": 2}}])
def test_attention_that_fits_in_part_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    depth = {"backbone_args": {"depth": 20}}
    torch.save(small_task(**depth).backbone.state_dict(), tmp_path / "attached.pth")
    with pytest.raises(ValueError, match="holds different attention than this network"):
        small_task(**depth, **options, init_from=str(tmp_path / "attached.pth"))


# ---- detectors


def body_of(task: DetectionTask) -> nn.Module:
    return task.get_submodule("detector.backbone.body")


def test_weights_of_a_plain_detector_go_into_one_with_attention(tmp_path: Path) -> None:
    plain = tiny_task(attention=None, seed=1)
    torch.save(plain.detector.state_dict(), tmp_path / "torchvision.pth")
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "task.ckpt")
    for name in ("torchvision.pth", "task.ckpt"):
        own = tiny_task(init_from=str(tmp_path / name)).state_dict()
        assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items()), name


@pytest.mark.parametrize("detector", ["fasterrcnn", "maskrcnn", "retinanet", "fcos"])
def test_a_detector_of_other_classes_keeps_the_start_of_what_names_them(tmp_path: Path, detector: str) -> None:
    other = tiny_task(detector, num_classes=7, seed=1)
    torch.save(other.detector.state_dict(), tmp_path / "other.pth")
    fresh = tiny_task(detector)
    before = {key: value.clone() for key, value in fresh.detector.state_dict().items()}
    said = load_detector_weights(fresh.detector, str(tmp_path / "other.pth"))
    assert "the classifier keeps its initial values" in said
    classes = {key for key, value in before.items() if value.shape != other.detector.state_dict()[key].shape}
    assert classes
    for key, value in fresh.detector.state_dict().items():
        expected = before[key] if key in classes else other.detector.state_dict()[key]
        assert torch.equal(value, expected), key


def test_a_classifier_of_this_package_gives_the_backbone_its_weights(tmp_path: Path) -> None:
    classifier = small_task(backbone_args=BACKBONE)
    torch.save({"state_dict": classifier.state_dict(), "dia_task": "ClassificationTask"}, tmp_path / "task.ckpt")
    weights = {key: value for key, value in classifier.backbone.state_dict().items() if not key.startswith("fc.")}
    assert any(".dia." in key for key in weights)
    for frozen in (False, True):
        own = body_of(tiny_task(seed=1, init_from=str(tmp_path / "task.ckpt"), frozen_norm=frozen)).state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in own.items())
    with pytest.raises(ValueError, match="holds different attention than this network"):
        tiny_task(identity=True, init_from=str(tmp_path / "task.ckpt"))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v3_small", "timm/convnext_atto"])
def test_a_classifier_of_a_library_gives_the_backbone_its_weights(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    weights = get_model(name).state_dict()
    torch.save(weights, tmp_path / "classifier.pth")
    task = tiny_task(backbone=name, backbone_args=None, init_from=str(tmp_path / "classifier.pth"))
    own = {key: value for key, value in body_of(task).state_dict().items() if ".dia." not in key}
    by_place = {key.removeprefix("features.").replace(".", "_"): value for key, value in weights.items()}
    assert own
    assert all(torch.equal(value, by_place[key.replace(".", "_")]) for key, value in own.items())


@pytest.mark.parametrize(
    ("name", "args"),
    [("cifar_resnet", {"depth": 14, "block": "basic"}), ("cifar_resnet", {"depth": 11}), ("torchvision/vit_b_16", {})],
)
def test_a_classifier_of_another_kind_is_refused(tmp_path: Path, name: str, args: dict[str, Any]) -> None:
    torch.save(get_model(name, **args).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth' holds a different network"):
        tiny_task(init_from=str(tmp_path / "other.pth"))


def test_another_detector_is_refused(tmp_path: Path) -> None:
    torch.save(tiny_task("fasterrcnn").detector.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds a different network: 12 weights are missing \(roi_heads\.mask_"):
        tiny_task("maskrcnn", init_from=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"holds a different network"):
        tiny_task("retinanet", init_from=str(tmp_path / "other.pth"))
