"""Wide residual network for small images."""

from functools import partial

import torch
from torch import nn

from dia_lightning.models._cifar_network import CifarNetwork, blocks_per_stage, require_positive
from dia_lightning.models._registry import register_model
from dia_lightning.models.cifar_preresnet import BasicBlock as PreactivationBlock


class BasicBlock(PreactivationBlock):
    """Norm, ReLU and 3x3 convolution, twice, with dropout between them; the branch ends with ``conv2``.

    Where the shape changes, the shortcut is a projection of the activated input; elsewhere it is the raw input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        dropout: probability that a value between the convolutions is zeroed, in [0, 1].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        activated = self.relu(self.bn1(features))
        shortcut = features if self.downsample is None else self.downsample(activated)
        branch = self.relu(self.bn2(self.conv1(activated)))
        branch = self.conv2(self.dropout(branch))
        output: torch.Tensor = branch + shortcut
        return output


@register_model("cifar_wrn")
def cifar_wrn(
    *,
    depth: int = 52,
    widen_factor: int = 4,
    dropout: float = 0.0,
    num_classes: int = 100,
    in_channels: int = 3,
) -> CifarNetwork:
    """Build a wide residual network for small images.

    It has pre-activation basic blocks in stages of 16, 32 and 64 channels, widened.

    Args:
        depth: number of layers, 6n+4 (n blocks per stage).
        widen_factor: multiplies the width of all stages.
        dropout: probability of dropout inside the blocks, in [0, 1]; the authors of DIANet train with 0.3.
        num_classes: number of classes.
        in_channels: channels of the images.

    Returns:
        A network from images ``[B, in_channels, H, W]``, H and W at least 8, to logits ``[B, num_classes]``.

    Raises:
        ValueError: if the depth is impossible, ``dropout`` outside [0, 1], or a size below 1.

    Source:
        Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016; initialisation as in gbup-group/DIANet,
        models/cifar/dia_wrn.py, without its batch norm between branch and attention.

    Example:
        >>> network = cifar_wrn(depth=10, widen_factor=2, num_classes=10)
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    require_positive(widen_factor=widen_factor)
    network = CifarNetwork(
        partial(BasicBlock, dropout=dropout),
        blocks=blocks_per_stage("cifar_wrn", depth, layers_per_block=2, other_layers=4),
        stem_channels=16,
        stage_channels=[width * widen_factor for width in (16, 32, 64)],
        num_classes=num_classes,
        in_channels=in_channels,
        preactivation=True,
    )
    nn.init.zeros_(network.fc.bias)
    return network


@register_model("wrn52_4")
def wrn52_4(*, dropout: float = 0.3, num_classes: int = 100, in_channels: int = 3) -> CifarNetwork:
    """Build the WRN52-4 of the paper: ``cifar_wrn`` with 8 blocks per stage, four times as wide, with dropout."""
    return cifar_wrn(depth=52, widen_factor=4, dropout=dropout, num_classes=num_classes, in_channels=in_channels)
