"""Exported files compute what the network computes, also for other batch sizes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dia_lightning.attention import attach
from dia_lightning.models import export_network, get_model


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = attach(get_model("cifar_resnet", depth=11, num_classes=10), "dia-lstm")
    network(torch.randn(8, 3, 16, 16))  # moves the running statistics
    return network


def test_torch_export_keeps_outputs_and_the_batch_size_free(network: nn.Module, tmp_path: Path) -> None:
    metadata = {"mean": "[0.5]"}
    exported = export_network(network, torch.randn(2, 3, 16, 16), tmp_path / "network.pt2", metadata=metadata)
    assert exported.difference < 1e-5
    images = torch.randn(5, 3, 16, 16)
    extra = {"mean": ""}
    loaded = torch.export.load(tmp_path / "network.pt2", extra_files=extra).module()
    torch.testing.assert_close(loaded(images), network.eval()(images))
    assert extra == metadata


def test_onnx_keeps_outputs_and_the_batch_size_free(network: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    metadata = {"mean": "[0.5]"}
    exported = export_network(network, torch.randn(2, 3, 16, 16), tmp_path / "network.onnx", metadata=metadata)
    assert exported.difference < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    assert session.get_modelmeta().custom_metadata_map == metadata
    images = torch.randn(5, 3, 16, 16)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_an_example_of_one_image_keeps_the_batch_size_free(network: nn.Module, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"network.{ending}"
    images = torch.randn(5, 3, 16, 16)
    if ending == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    assert export_network(network, images[:1], path).difference < 1e-5
    if ending == "onnx":
        session = onnxruntime.InferenceSession(path)
        logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    else:
        logits = torch.export.load(path).module()(images)
    torch.testing.assert_close(logits, network.eval()(images), rtol=1e-4, atol=1e-5)


def test_modes_of_all_modules_stay(network: nn.Module, tmp_path: Path) -> None:
    frozen = network.get_submodule("layer1.0.bn1").eval()
    export_network(network, torch.randn(2, 3, 16, 16), tmp_path / "network.safetensors")
    assert [module for module in network.modules() if not module.training] == [frozen]


def test_safetensors_hold_a_shared_weight_once(tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 3, 1, bias=False) for _ in range(2)]
    layers[1].weight = layers[0].weight
    exported = export_network(nn.Sequential(*layers), torch.randn(1, 3, 4, 4), tmp_path / "network.safetensors")
    assert exported.difference == 0


def test_safetensors_hold_every_weight_once(network: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    exported = export_network(network, torch.randn(2, 3, 16, 16), tmp_path / "new folder" / "network.safetensors")
    assert exported.difference == 0
    assert set(load_file(exported.path)) == set(network.state_dict())


def test_the_snippet_runs(network: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    exported = export_network(network, images, tmp_path / "network.pt2")
    names = {"images": images}
    exec(exported.snippet, names)
    torch.testing.assert_close(names["logits"], network.eval()(images))


class TwoOutputs(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images


def test_a_network_with_several_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must return one tensor, got tuple"):
        export_network(TwoOutputs(), torch.randn(1, 3, 16, 16), tmp_path / "network.pt2")


def test_an_image_without_a_batch_is_refused(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\] .* got \[3, 16, 16\]"):
        export_network(network, torch.randn(3, 16, 16), tmp_path / "network.pt2")


def test_an_unknown_ending_is_refused(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'network\.h5' must be one of \.onnx, \.pt2, \.safetensors"):
        export_network(network, torch.randn(1, 3, 16, 16), "network.h5")
