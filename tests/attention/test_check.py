"""check() says what does not hold."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from dia_lightning.attention import SqueezeExcitation, attach, check
from dia_lightning.models import get_model


def test_check_refuses_a_network_whose_output_is_not_finite() -> None:
    network: Any = attach(get_model("cifar_resnet", depth=11), "se")
    nn.init.constant_(network.fc.bias, float("nan"))
    with pytest.raises(ValueError, match="puts out NaN or infinity"):
        check(network, torch.randn(2, 3, 16, 16))


def test_check_says_what_does_not_hold() -> None:
    class Sticky(SqueezeExcitation):
        """Remembers the features of the forward before."""

        last: torch.Tensor | None = None

        def forward(self, features: torch.Tensor, state: None = None) -> tuple[torch.Tensor, None]:
            attention_map, _ = super().forward(features, state)
            if self.last is not None and self.last.shape == attention_map.shape:
                attention_map = attention_map * self.last
            self.last = attention_map.detach()
            return attention_map, None

    report = check(attach(get_model("cifar_resnet", depth=20), Sticky), torch.randn(2, 3, 16, 16))
    failed = {row.name for row in report.rows if not row.holds}
    assert "earlier forwards do not matter" in failed
    assert not report.ok
    assert "NO" in str(report)


def test_a_detector_is_checked_by_its_backbone() -> None:
    detector = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    attach(detector, "se")
    with pytest.raises(ValueError, match=r"check\(detector.backbone"):
        check(detector, torch.rand(2, 3, 64, 64))
