"""Detectors on the backbones of ``get_model``, against those that torchvision builds itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from dia_lightning.attention import attach
from dia_lightning.models.detectors import get_detector
from tests.tasks.tiny_detection import (
    BACKBONE,
    assert_equal_detections,
    tiny_batch,
    tiny_task,
    training_batch,
)

BUILDERS = {
    "fasterrcnn": fasterrcnn_resnet50_fpn,
    "maskrcnn": maskrcnn_resnet50_fpn,
    "retinanet": retinanet_resnet50_fpn,
    "fcos": fcos_resnet50_fpn,
}
KINDS: dict[str, dict[str, Any]] = {
    "cifar_resnet": BACKBONE,
    "cifar_resnext": {"depth": 11, "base_width": 4, "widen_factor": 1},
    "torchvision/resnet18": {},
    "torchvision/convnext_tiny": {},
    "torchvision/mobilenet_v3_small": {},
    "timm/resnet10t": {"zero_init_last": False},
    "timm/convnext_atto": {},
}


def is_attention(name: str) -> bool:
    return ".dia." in name


def backward(losses: dict[str, Tensor]) -> None:
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]


# ---- torchvision's own


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_losses_and_detections_are_those_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"min_size": 64, "max_size": 96}
    if name in ("retinanet", "fcos"):
        options["score_thresh"] = 0.0  # before training no score reaches the default
    else:
        options |= {"box_batch_size_per_image": 32, "box_detections_per_img": 10}  # of 512 and 100, each with a mask
    ours = get_detector(name, "torchvision/resnet50", num_classes=4, **options)  # type: ignore[arg-type]
    theirs = BUILDERS[name](weights=None, weights_backbone=None, num_classes=5, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    results = []
    for network in (ours, theirs):
        torch.manual_seed(1)  # of the samplers
        results.append(network.train()(*training_batch(2, 1, masks=True)))
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(results[0][term], results[1][term]) for term in results[1])
    images, _, _ = tiny_batch(1, 2, seed=2)
    with torch.no_grad():
        assert_equal_detections(ours.eval()(images), theirs.eval()(images))


def test_frozen_norms_and_attention_go_together_in_detectors_of_torchvision() -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    detector = FasterRCNN(backbone, 4, min_size=64, max_size=96)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in detector.modules())
    attach(detector, "dia-lstm")
    backward(detector.train()(*training_batch(2, 1)))
    assert sum(name.endswith(".dia") for name, _ in detector.named_modules()) == 4
    missing = [name for name, part in detector.named_parameters() if part.requires_grad and part.grad is None]
    assert missing == []


# ---- any backbone


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_trained_in_every_kind_of_backbone(kind: str, frozen: bool) -> None:
    options: dict[str, Any] = {"trainable_layers": 0, "frozen_norm": True} if frozen else {}
    task = tiny_task(backbone=kind, backbone_args=KINDS[kind], **options)
    backward(task.train().losses(*training_batch(2, 1)))
    parameters = dict(task.named_parameters())
    attention = {name: part for name, part in parameters.items() if is_attention(name)}
    assert len({name.partition(".dia.")[0] for name in attention}) >= 3  # stages
    assert all(part.requires_grad for part in attention.values())
    assert [name for name, part in parameters.items() if part.requires_grad and part.grad is None] == []
    assert any(part.grad.abs().max() > 0 for part in attention.values())  # type: ignore[union-attr]
    trained = {name for name, part in parameters.items() if part.requires_grad and "backbone.body." in name}
    assert (trained == set(attention)) == frozen


@pytest.mark.parametrize("name", ["maskrcnn", "retinanet", "fcos"])
def test_every_detector_trains_attention_and_detects(name: str) -> None:
    task = tiny_task(name)
    backward(task.train().losses(*training_batch(2, 1, masks=True)))
    assert [name for name, part in task.named_parameters() if part.grad is None] == []
    assert any(is_attention(name) for name, _ in task.named_parameters())
    with torch.no_grad():
        detections = task.eval()(tiny_batch(1, 2)[0])
    for found in detections:
        assert len(found["boxes"]) > 0
        assert set(found["labels"].tolist()) <= {1, 2, 3}
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def test_the_stride_decides_the_size_of_the_anchors() -> None:
    def sides(name: str, **options: Any) -> Any:
        network: Any = get_detector(name, "cifar_resnet", num_classes=1, backbone_args=BACKBONE, **options)  # type: ignore[arg-type]
        return (network.rpn if "rcnn" in name else network).anchor_generator.sizes

    assert sides("fasterrcnn") == ((32,), (64,), (128,), (256,))
    assert sides("fcos", fpn_channels=32) == ((4,), (8,), (16,), (32,), (64,))
    assert sides("retinanet")[0] == (16, 20, 25)
    assert sides("fasterrcnn", anchor_sizes=[[8], [16], [32], [64]]) == ((8,), (16,), (32,), (64,))


def test_a_network_object_becomes_the_body() -> None:
    network: Any = resnet18()
    detector = get_detector("fasterrcnn", network, num_classes=1, fpn_channels=16)
    body = dict(detector.get_submodule("backbone.body").named_children())
    assert body["layer1"] is network.layer1
    assert "fc" not in body


def test_a_backbone_with_its_own_feature_maps_is_used_unchanged() -> None:
    backbone: Any = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    detector = get_detector("fasterrcnn", backbone, num_classes=3, min_size=64)
    assert detector.get_submodule("backbone") is backbone
    with pytest.raises(ValueError, match=r"frozen_norm is not for a backbone with out_channels.*got True\. Omit"):
        get_detector("fasterrcnn", backbone, num_classes=3, frozen_norm=True)
    with pytest.raises(ValueError, match=r"trainable_layers is not for a backbone with out_channels.*got 0"):
        get_detector("fasterrcnn", backbone, num_classes=3, trainable_layers=0)


# ---- SSDlite


def test_ssdlite_is_that_of_torchvision_and_trains_with_attention() -> None:
    task = tiny_task("ssdlite", backbone="torchvision/mobilenet_v3_large", backbone_args=None)
    theirs = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, score_thresh=0.0, detections_per_img=10
    )
    weights = {name: value for name, value in task.detector.state_dict().items() if not is_attention(name)}
    assert list(weights) == list(theirs.state_dict())
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3)
    backward(task.train().losses(*training_batch(2, 1)))
    optimizer.step()
    attention = [part for name, part in task.named_parameters() if is_attention(name)]
    assert attention
    assert all(part.grad is not None and torch.isfinite(part).all() for part in attention)
    with torch.no_grad():
        assert [len(found["boxes"]) for found in task.eval()(tiny_batch(1)[0])] == [10]


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detector": "yolo"}, r"detector must be one of fasterrcnn, maskrcnn, retinanet, fcos, ssdlite, got 'yolo'"),
        ({"num_classes": 0}, "num_classes must be 1 or more, without the background, got 0"),
        ({"score_thresh": 0.1}, "fasterrcnn does not take 'score_thresh'. It takes: min_size, max_size, "),
        ({"num_class": 3}, "fasterrcnn does not take 'num_class'"),
        ({"detector": "fcos", "box_score_thresh": 0.1}, "fcos does not take 'box_score_thresh'"),
        ({"detector": "retinanet", "representation_size": 64}, "representation_size is not for retinanet, got 64"),
        (
            {"anchor_sizes": [[8], [16]]},
            r"anchor_sizes must be 4 lists of equal length.*\[\[32\], .*got \[\[8\], \[16\]",
        ),
        ({"anchor_sizes": [[8], [16], [32], [64, 80]]}, "anchor_sizes must be 4 lists of equal length"),
        ({"trainable_layers": 5}, r"trainable_layers must be 0 \(all frozen\) to 4 \(the stem and 3 stages"),
        ({"backbone": "torchvision/vit_b_16", "backbone_args": None}, "torchvision/vit_b_16 has no stages"),
        ({"backbone": "cifar_resnt"}, "cifar_resnet"),
        (
            {"detector": "ssdlite"},
            "ssdlite is built by torchvision on torchvision/mobilenet_v3_large .* got cifar_resnet",
        ),
        ({"detector": "ssdlite", "backbone": nn.Linear(1, 1)}, "torchvision/mobilenet_v3_large only, got Linear"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"detector": "fasterrcnn", "backbone": "cifar_resnet", "num_classes": 3, "backbone_args": BACKBONE}
    with pytest.raises(ValueError, match=message):
        get_detector(**{**arguments, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_norm": True}, "frozen_norm is not for ssdlite, got True"),
        ({"trainable_layers": 2}, "trainable_layers is not for ssdlite, got 2"),
        ({"fpn_channels": 64}, "fpn_channels is not for ssdlite, got 64"),
        ({"score_tresh": 0.1}, "ssdlite does not take 'score_tresh'. It takes: image_mean, image_std, score_thresh"),
        ({"min_size": 64}, "ssdlite does not take 'min_size'"),
        ({"backbone_args": {"width_mult": 0.5}}, "ssdlite takes only weights in backbone_args"),
    ],
)
def test_ssdlite_refuses_options_it_lacks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_detector("ssdlite", "torchvision/mobilenet_v3_large", num_classes=3, **options)
