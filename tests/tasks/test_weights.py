"""Starting from the weights of a file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dia_lightning.models import get_model
from dia_lightning.tasks import load_task
from dia_lightning.tasks._weights import load_weights
from tests.tasks.conftest import small_task


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
    assert "the classifier kept" in said
    assert torch.equal(network.fc.weight, before)  # type: ignore[arg-type, union-attr]
    assert torch.equal(network.state_dict()["conv1.weight"], torch.load(plain)["conv1.weight"])


def test_weights_of_another_network_are_refused(plain: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another network: .* weights are missing"):
        load_weights(get_model("cifar_resnet", depth=20, num_classes=10), str(plain))
    with pytest.raises(ValueError, match="holds another network"):
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
    with pytest.raises(ValueError, match=r"other\.ckpt' is damaged or no checkpoint of dia-lightning"):
        load_task(tmp_path / "other.ckpt")
    torch.save({"dia_task": "SegmentationTask"}, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match="was written by SegmentationTask, which is not imported"):
        load_task(tmp_path / "later.ckpt")


@pytest.mark.parametrize("options", [{"identity": True}, {"share": "block"}, {"attention_args": {"cells": 2}}])
def test_attention_that_fits_in_part_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    depth = {"backbone_args": {"depth": 20}}
    torch.save(small_task(**depth).backbone.state_dict(), tmp_path / "attached.pth")
    with pytest.raises(ValueError, match="holds other attention than this network has"):
        small_task(**depth, **options, init_from=str(tmp_path / "attached.pth"))
