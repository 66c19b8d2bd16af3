"""Boxes and anchors keep their pixels in the low precision of autocast."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.models.detectors import Detector, get_detector

BOX = torch.tensor([[701.0, 603.0, 721.0, 621.0]])  # bfloat16 would make it 700, 604, 720, 620


def small(detector: Detector) -> Any:
    args = {"depth": 8, "block": "basic", "stem_stride": 4}
    return get_detector(
        detector, "cifar_resnet", num_classes=2, backbone_args=args, fpn_channels=32, min_size=64
    ).eval()


def decoded(detector: Detector) -> list[Tensor]:
    """Return what becomes of a box for a predicted offset of zero, in bfloat16."""
    network = small(detector)
    nothing = torch.zeros(1, 4, dtype=torch.bfloat16)
    if detector == "fcos":
        sides = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.bfloat16)  # from the middle, in widths and heights
        return [network.box_coder.decode(sides, BOX)]
    coders = [network.box_coder] if detector == "retinanet" else [network.rpn.box_coder, network.roi_heads.box_coder]
    return [coder.decode_single(nothing, BOX) for coder in coders]


@pytest.mark.parametrize("detector", ["fasterrcnn", "maskrcnn", "retinanet", "fcos"])
def test_a_box_keeps_its_place_under_autocast(detector: Detector) -> None:
    for box in decoded(detector):
        assert torch.equal(box, BOX)


@pytest.mark.parametrize("detector", ["fasterrcnn", "retinanet", "fcos"])
def test_anchors_are_made_in_full_precision(detector: Detector) -> None:
    network = small(detector)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = network.backbone(torch.rand(1, 3, 64, 64))
        boxes = network([torch.rand(3, 64, 96)])[0]["boxes"]
    assert {feature.dtype for feature in maps.values()} == {boxes.dtype} == {torch.float32}
