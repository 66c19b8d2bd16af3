"""ResNet for small images, pre-activation."""

from typing import Literal

import torch
from torch import nn

from dia_lightning.models._cifar_network import CifarNetwork, classic_network, conv1x1, conv3x3, projection
from dia_lightning.models._registry import register_model


class BasicBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, and a shortcut of the raw input; the branch ends with ``conv2``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, out_channels, stride, norm=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        branch = self.conv1(self.relu(self.bn1(features)))
        branch = self.conv2(self.relu(self.bn2(branch)))
        output: torch.Tensor = branch + shortcut
        return output


class Bottleneck(nn.Module):
    """Norm, ReLU and convolution (1x1, 3x3, 1x1), three times, and a raw shortcut; the branch ends with ``conv3``.

    The authors of DIANet project the raw input in the first block of a stage; He et al. project the activated one.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of 4.
        stride: stride of the 3x3 convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        inner = out_channels // 4
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, out_channels, stride, norm=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        branch = self.conv1(self.relu(self.bn1(features)))
        branch = self.conv2(self.relu(self.bn2(branch)))
        branch = self.conv3(self.relu(self.bn3(branch)))
        output: torch.Tensor = branch + shortcut
        return output


@register_model("cifar_preresnet")
def cifar_preresnet(
    *,
    depth: int = 164,
    block: Literal["bottleneck", "basic"] = "bottleneck",
    widen_factor: int = 1,
    num_classes: int = 100,
    in_channels: int = 3,
) -> CifarNetwork:
    """Build a pre-activation ResNet for small images with stages of 16, 32 and 64 channels.

    With bottlenecks the stages have four times as many.

    Args:
        depth: number of layers, 9n+2 with bottlenecks and 6n+2 with basic blocks (n blocks per stage).
        block: kind of residual block.
        widen_factor: multiplies the width of all stages.
        num_classes: number of classes.
        in_channels: channels of the images.

    Returns:
        A network from images ``[B, in_channels, H, W]``, H and W at least 8, to logits ``[B, num_classes]``.

    Raises:
        ValueError: if the depth is impossible, the block unknown, or a size below 1.

    Source:
        He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; shortcuts and initialisation as in
        gbup-group/DIANet, models/cifar/dia_preresnet.py, without its batch norm between branch and attention.

    Example:
        >>> network = cifar_preresnet(depth=14, block="basic", num_classes=10)
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return classic_network(
        "cifar_preresnet",
        basic=BasicBlock,
        bottleneck=Bottleneck,
        block=block,
        depth=depth,
        widen_factor=widen_factor,
        num_classes=num_classes,
        in_channels=in_channels,
        preactivation=True,
    )


@register_model("preresnet164")
def preresnet164(*, num_classes: int = 100, in_channels: int = 3) -> CifarNetwork:
    """Build the PreResNet164 of the paper: ``cifar_preresnet`` with 18 bottlenecks per stage."""
    return cifar_preresnet(depth=164, num_classes=num_classes, in_channels=in_channels)
