"""ResNet for small images, post-activation."""

from typing import Literal

import torch
from torch import nn

from dia_lightning.models._cifar_network import CifarNetwork, classic_network, conv1x1, conv3x3, projection
from dia_lightning.models._registry import register_model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the branch ends with ``bn2``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, out_channels, stride, norm=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        branch = self.relu(self.bn1(self.conv1(features)))
        branch = self.bn2(self.conv2(branch))
        output: torch.Tensor = self.relu(branch + shortcut)
        return output


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 and a shortcut; the branch ends with ``bn3``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the 3x3 convolution and of the shortcut.
        inner_channels: channels of the 3x3 convolution; by default a quarter of the output's.
        groups: groups of the 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        inner_channels: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        inner = out_channels // 4 if inner_channels is None else inner_channels
        self.conv1 = conv1x1(in_channels, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, out_channels, stride, norm=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        branch = self.relu(self.bn1(self.conv1(features)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        output: torch.Tensor = self.relu(branch + shortcut)
        return output


@register_model("cifar_resnet")
def cifar_resnet(
    *,
    depth: int = 164,
    block: Literal["bottleneck", "basic"] = "bottleneck",
    widen_factor: int = 1,
    num_classes: int = 100,
    in_channels: int = 3,
    stem_stride: int = 1,
) -> CifarNetwork:
    """Build a ResNet for small images with stages of 16, 32 and 64 channels (four times that with bottlenecks).

    Args:
        depth: number of layers, 9n+2 with bottlenecks and 6n+2 with basic blocks (n blocks per stage).
        block: kind of residual block.
        widen_factor: multiplies the width of all stages.
        num_classes: number of classes.
        in_channels: channels of the images.
        stem_stride: stride of the first convolution; 2 or 4 make a small backbone for larger images, as detectors
            take them.

    Returns:
        A network from images ``[B, in_channels, H, W]``, H and W at least 8, to logits ``[B, num_classes]``.

    Raises:
        ValueError: if the depth is impossible, the block unknown, or a size below 1.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2; initialisation as in
        gbup-group/DIANet, models/cifar/dia_resnet.py.

    Example:
        >>> network = cifar_resnet(depth=11, num_classes=10)
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return classic_network(
        "cifar_resnet",
        basic=BasicBlock,
        bottleneck=Bottleneck,
        block=block,
        depth=depth,
        widen_factor=widen_factor,
        num_classes=num_classes,
        in_channels=in_channels,
        preactivation=False,
        stem_stride=stem_stride,
    )


@register_model("resnet164")
def resnet164(*, num_classes: int = 100, in_channels: int = 3) -> CifarNetwork:
    """Build the ResNet164 of the paper: ``cifar_resnet`` with 18 bottlenecks per stage."""
    return cifar_resnet(depth=164, num_classes=num_classes, in_channels=in_channels)
