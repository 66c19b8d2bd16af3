"""ResNeXt for small images."""

import math

from torch import nn

from dia_lightning.models._cifar_network import CifarNetwork, blocks_per_stage, require_positive
from dia_lightning.models._registry import register_model
from dia_lightning.models.cifar_resnet import Bottleneck as ResNetBottleneck


class Bottleneck(ResNetBottleneck):
    """Convolutions 1x1, grouped 3x3, 1x1 (form C of the paper) and a shortcut; the branch ends with ``bn3``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the 3x3 convolution and of the shortcut.
        cardinality: groups of the 3x3 convolution.
        group_width: channels of each group.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, cardinality: int, group_width: int
    ) -> None:
        inner = cardinality * group_width
        super().__init__(in_channels, out_channels, stride, inner_channels=inner, groups=cardinality)


@register_model("cifar_resnext")
def cifar_resnext(
    *,
    depth: int = 101,
    cardinality: int = 8,
    base_width: int = 32,
    widen_factor: int = 4,
    num_classes: int = 100,
    in_channels: int = 3,
) -> CifarNetwork:
    """Build a ResNeXt for small images with stages of 32, 64 and 128 channels, widened.

    Args:
        depth: number of layers, 9n+2 (n blocks per stage).
        cardinality: groups of the 3x3 convolutions.
        base_width: channels per group in the first stage; doubles with each stage.
        widen_factor: multiplies the width of all stages.
        num_classes: number of classes.
        in_channels: channels of the images.

    Returns:
        A network from images ``[B, in_channels, H, W]``, H and W at least 8, to logits ``[B, num_classes]``.

    Raises:
        ValueError: if the depth is impossible, or a size below 1.

    Source:
        Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017; widths, stem and
        initialisation as in gbup-group/DIANet, models/cifar/dia_resnext.py.

    Example:
        >>> import torch
        >>> network = cifar_resnext(depth=11, cardinality=2, base_width=8, num_classes=10)
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    require_positive(cardinality=cardinality, base_width=base_width, widen_factor=widen_factor)
    first_width = 32 * widen_factor

    def make_block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        group_width = base_width * out_channels // first_width
        return Bottleneck(in_channels, out_channels, stride, cardinality=cardinality, group_width=group_width)

    network = CifarNetwork(
        make_block,
        blocks=blocks_per_stage("cifar_resnext", depth, layers_per_block=3, other_layers=2),
        stem_channels=32,
        stage_channels=[first_width, 2 * first_width, 4 * first_width],
        num_classes=num_classes,
        in_channels=in_channels,
        preactivation=False,
    )
    nn.init.normal_(network.fc.weight, std=math.sqrt(2 / network.fc.in_features))
    nn.init.zeros_(network.fc.bias)
    return network


@register_model("resnext101_8x32")
def resnext101_8x32(*, num_classes: int = 100, in_channels: int = 3) -> CifarNetwork:
    """Build the ResNeXt101-8x32 of the paper: ``cifar_resnext`` with 11 blocks per stage, 8 groups of 32 channels."""
    return cifar_resnext(depth=101, cardinality=8, base_width=32, num_classes=num_classes, in_channels=in_channels)
