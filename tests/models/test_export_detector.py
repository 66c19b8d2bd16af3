"""Exported detectors find what the detector finds, also in images of other sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dia_lightning.models import export_detector
from dia_lightning.models._exported_detector import matches
from tests.tasks.tiny_detection import tiny_batch, tiny_task

IMAGES = tiny_batch(3, 2)[0]  # 64 x 64 and 64 x 80
#: The last two are resized as in PyTorch only where their scale is computed in double precision.
OTHER_SIZES = [torch.rand(3, *size) for size in ((90, 50), (41, 47), (40, 74))]


def detector_of(kind: str) -> nn.Module:
    """A detector whose scores differ, so that their order does not depend on rounding."""
    special: dict[str, dict[str, Any]] = {
        "ssdlite": {"backbone": "torchvision/mobilenet_v3_large", "backbone_args": None},
        "fcos": {"detector_args": {"fpn_channels": 64}},  # its norms refuse one value per group
    }
    detector = tiny_task(kind, **special.get(kind, {})).detector
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.9
        for seed in range(4):  # statistics that fit keep features alive
            detector.backbone(detector.transform(tiny_batch(3, 3, seed=seed)[0])[0].tensors)  # type: ignore[operator]
        for name, weight in detector.named_parameters():
            if name.rpartition(".")[0].endswith(("cls_score", "cls_logits")) or "classification_head" in name:
                weight.normal_(0, 1 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1, generator=generator)
    return detector.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["maskrcnn", "retinanet", "fcos", "ssdlite"])  # Mask R-CNN is a Faster R-CNN
def test_an_onnx_file_finds_what_the_detector_finds(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    detector = detector_of(kind)
    exported = export_detector(detector, IMAGES, tmp_path / "detector.onnx", metadata={"class_names": '["a", "b"]'})
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx")
    assert exported.matched == exported.objects >= 10
    assert exported.extra == 0
    assert session.get_modelmeta().custom_metadata_map["class_names"] == '["a", "b"]'
    names = [output.name for output in session.get_outputs()]
    assert names == ["boxes", "labels", "scores", "masks"][: 4 if kind == "maskrcnn" else 3]
    for image in OTHER_SIZES:
        expected = detector([image])[0]
        found = dict(zip(names, map(torch.from_numpy, session.run(None, {"image": image.numpy()})), strict=True))
        wanted = expected["labels"] > 0
        rows, columns = matches({name: values[wanted] for name, values in expected.items()}, found)
        assert len(rows) == int(wanted.sum()) == len(found["labels"]) > 0
        for name in names:
            torch.testing.assert_close(found[name][columns], expected[name][wanted][rows], rtol=1e-3, atol=1e-3)


def test_weights_alone_have_the_names_of_the_detector(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    detector = detector_of("retinanet").train()
    exported = export_detector(detector, IMAGES, tmp_path / "detector.safetensors")
    assert (exported.matched, exported.extra) == (exported.objects, 0)
    assert set(exported.differences.values()) == {0.0}
    assert set(load_file(exported.path)) == set(detector.state_dict())
    assert detector.training


def test_objects_belong_together_by_label_place_and_score_and_only_once() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [5, 5, 20, 20], [40, 40, 50, 50]])
    one = {"boxes": boxes, "labels": torch.tensor([1, 1, 2, 3]), "scores": torch.tensor([0.9, 0.9, 0.5, 0.4])}
    swapped: dict[str, Tensor] = {name: values[[2, 1, 3]] for name, values in one.items()}
    assert matches(one, swapped) == ([0, 2, 3], [1, 0, 2])
    for name, change in (("boxes", 0.2), ("labels", 1), ("scores", 0.01)):
        assert matches(one, {**swapped, name: swapped[name] + change})[0] == []
    assert matches(one, {name: values[:0] for name, values in one.items()}) == ([], [])


def test_other_endings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'detector\.pt2' must be one of \.onnx, \.safetensors for a detector"):
        export_detector(nn.Identity(), IMAGES, "detector.pt2")


class Untraceable(nn.Module):
    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError("no such operator")
        return [{"boxes": torch.ones(1, 4), "labels": torch.ones(1), "scores": torch.ones(1)}]


def test_a_detector_that_cannot_be_traced_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"Untraceable cannot be written to ONNX \(no such operator\). Write its w"):
        export_detector(Untraceable(), IMAGES, tmp_path / "detector.onnx")


def test_a_comparison_without_objects_says_so(tmp_path: Path) -> None:
    detector = tiny_task("retinanet", detector_args={"score_thresh": 0.99}).detector
    exported = export_detector(detector, IMAGES, tmp_path / "detector.safetensors")
    assert exported.agreement.startswith("neither network nor file finds an object in 2 images")
