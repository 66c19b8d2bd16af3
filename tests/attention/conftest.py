"""Networks with attention and their plain twins. Every test gets its own copy."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from dia_lightning.attention import _recalibration as recalibration

from .networks import TinyNet, pair


@pytest.fixture
def tiny() -> tuple[TinyNet, TinyNet]:
    """Plain and attached tiny network in float64, in eval mode."""
    plain, attached = pair(TinyNet().double().eval())
    return plain, attached


@pytest.fixture
def resnet18_pair() -> tuple[nn.Module, nn.Module]:
    """torchvision's ResNet18, plain and attached, in float64 and eval mode."""
    return pair(resnet18(num_classes=5).double().eval())


@pytest.fixture
def resnet50_pair() -> tuple[nn.Module, nn.Module]:
    """torchvision's ResNet50, plain and attached, in float64 and eval mode."""
    return pair(resnet50(num_classes=5).double().eval(), reduction=16)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_large_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat small features like large ones."""
    monkeypatch.setattr(recalibration, "SMALL_ON_CPU", 0)
