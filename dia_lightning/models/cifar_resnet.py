"""ResNet for small images, post-activation."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from dia_lightning.models._cifar_network import (
    CifarNetwork,
    batch_norm,
    classic_network,
    conv1x1,
    conv3x3,
    projection,
)
from dia_lightning.models._registry import register_model


class _Block(nn.Module):
    """Base of both kinds of blocks: a removable shortcut, and a ReLU after the addition."""

    relu: nn.Module
    downsample: nn.Module | None
    has_shortcut = True

    def remove_shortcut(self) -> None:
        """Leave only the branch, even if the shortcut is a projection."""
        self.downsample = None
        self.has_shortcut = False

    def _join(self, branch: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.has_shortcut:
            branch = branch + (features if self.downsample is None else self.downsample(features))
        output: torch.Tensor = self.relu(branch)
        return output


class BasicBlock(_Block):
    """Two 3x3 convolutions and a shortcut; the branch ends with ``bn2``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        norm: whether batch norms follow the convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = batch_norm(out_channels, norm=norm)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = batch_norm(out_channels, norm=norm)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, out_channels, stride, norm=norm)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        branch = self.relu(self.bn1(self.conv1(features)))
        branch = self.bn2(self.conv2(branch))
        return self._join(branch, features)


class Bottleneck(_Block):
    """Convolutions 1x1, 3x3, 1x1 and a shortcut; the branch ends with ``bn3``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the 3x3 convolution and of the shortcut.
        inner_channels: channels of the 3x3 convolution; by default a quarter of the output's.
        groups: groups of the 3x3 convolution.
        norm: whether batch norms follow the convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        inner_channels: int | None = None,
        groups: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        inner = out_channels // 4 if inner_channels is None else inner_channels
        self.conv1 = conv1x1(in_channels, inner)
        self.bn1 = batch_norm(inner, norm=norm)
        self.conv2 = conv3x3(inner, inner, stride, groups)
        self.bn2 = batch_norm(inner, norm=norm)
        self.conv3 = conv1x1(inner, out_channels)
        self.bn3 = batch_norm(out_channels, norm=norm)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, out_channels, stride, norm=norm)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        branch = self.relu(self.bn1(self.conv1(features)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self._join(branch, features)


@register_model("cifar_resnet")
def cifar_resnet(
    *,
    depth: int = 164,
    block: Literal["bottleneck", "basic"] = "bottleneck",
    widen_factor: int = 1,
    num_classes: int = 100,
    in_channels: int = 3,
    stem_stride: int = 1,
    norm: bool = True,
    no_shortcut: Sequence[int] = (),
) -> CifarNetwork:
    """Build a ResNet for small images with stages of 16, 32 and 64 channels (four times that with bottlenecks).

    Args:
        depth: number of layers, 9n+2 with bottlenecks and 6n+2 with basic blocks (n blocks per stage).
        block: kind of residual block.
        widen_factor: multiplies the width of all stages.
        num_classes: number of classes.
        in_channels: channels of the images.
        stem_stride: stride of the first convolution; 2 or 4 make a small backbone for larger images, as in detection.
        norm: whether there are batch norms. Without them, as in the papers' stability experiment, nothing replaces
            them: convolutions still have no bias, and training may diverge.
        no_shortcut: stages, among 1, 2 and 3, whose blocks have no shortcut, including the first block's projection.
            Whether the papers' experiment keeps that one is unknown.

    Returns:
        A network from images ``[B, in_channels, H, W]``, H and W at least 8, to logits ``[B, num_classes]``.

    Raises:
        ValueError: if the depth is impossible, the block or a stage unknown, or a size below 1.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2; initialisation as in
        gbup-group/DIANet, models/cifar/dia_resnet.py.

    Example:
        >>> network = cifar_resnet(depth=11, num_classes=10)
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    for stage in no_shortcut:
        if stage not in (1, 2, 3):
            raise ValueError(f"no_shortcut takes stage numbers 1, 2 and 3, got {stage!r}.")
    network = classic_network(
        "cifar_resnet",
        basic=partial(BasicBlock, norm=norm),
        bottleneck=partial(Bottleneck, norm=norm),
        block=block,
        depth=depth,
        widen_factor=widen_factor,
        num_classes=num_classes,
        in_channels=in_channels,
        preactivation=False,
        stem_stride=stem_stride,
        norm=norm,
    )
    for stage in no_shortcut:  # afterwards, so that the other layers get the same initial weights as otherwise
        for made in network.get_submodule(f"layer{stage}").children():
            made.remove_shortcut()  # type: ignore[operator]
    return network


@register_model("resnet164")
def resnet164(*, num_classes: int = 100, in_channels: int = 3) -> CifarNetwork:
    """Build the ResNet164 of the paper: ``cifar_resnet`` with 18 bottlenecks per stage."""
    return cifar_resnet(depth=164, num_classes=num_classes, in_channels=in_channels)
