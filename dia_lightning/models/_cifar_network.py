"""What the four CIFAR families share: stem, three stages, pooling, classifier, depth arithmetic and initialisation."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dia_lightning._choices import check_choice


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


def batch_norm(channels: int, *, norm: bool) -> nn.Module:
    """Return a batch norm, or an identity if there is to be none."""
    return nn.BatchNorm2d(channels) if norm else nn.Identity()


def projection(in_channels: int, out_channels: int, stride: int, *, norm: bool) -> nn.Sequential | None:
    """Return the shortcut of a block: a 1x1 convolution, with or without norm, if the shape changes, else ``None``."""
    if stride == 1 and in_channels == out_channels:
        return None
    convolution = conv1x1(in_channels, out_channels, stride)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels)) if norm else nn.Sequential(convolution)


def require_positive(**options: int) -> None:
    """Refuse sizes below one, by name.

    Raises:
        ValueError: if a size is below one.
    """
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def blocks_per_stage(network: str, depth: int, *, layers_per_block: int, other_layers: int) -> int:
    """Solve ``depth = 3 * layers_per_block * n + other_layers`` for n.

    Args:
        network: what to call the network in the error.
        depth: number of weighted layers on the longest path, as in the network's name.
        layers_per_block: convolutions in the residual branch of a block.
        other_layers: layers outside the blocks that the family counts.

    Raises:
        ValueError: if there is no integer n >= 1; the message has the formula and the two nearest depths.
    """
    step = 3 * layers_per_block
    blocks = (depth - other_layers) // step
    if blocks >= 1 and depth == step * blocks + other_layers:
        return blocks
    lower = step * max(1, blocks) + other_layers
    raise ValueError(
        f"{network} has depth {step}n+{other_layers} with n >= 1, got depth={depth}. "
        f"The nearest possible depths are {lower} and {lower + step}."
    )


MakeBlock = Callable[[int, int, int], nn.Module]


class CifarNetwork(nn.Module):
    """Residual network for small images: a 3x3 stem, three stages (the second and third halve the size), a linear head.

    Convolutions are initialised from N(0, 2 / (k * k * out_channels)), norms to weight 1 and bias 0, as in all networks
    of the DIANet authors; the classifier keeps torch's default unless the family sets it.
    The last pooling is global, so images of any size from 8x8 work; at 32x32 it is the authors' 8x8.

    Args:
        block: makes a block from ``(input channels, output channels, stride)``.
        blocks: blocks per stage.
        stem_channels: output channels of the stem.
        stage_channels: output channels of the three stages.
        num_classes: number of classes.
        in_channels: channels of the images.
        preactivation: the blocks begin with norm and ReLU, so the network's own norm comes after the stages instead of
            after the stem.
        stem_stride: stride of the stem; above 2 its kernel grows so that no pixel is skipped.
        norm: whether the network has its own norm.
    """

    def __init__(
        self,
        block: MakeBlock,
        *,
        blocks: int,
        stem_channels: int,
        stage_channels: Sequence[int],
        num_classes: int,
        in_channels: int,
        preactivation: bool,
        stem_stride: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        require_positive(num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
        first, second, third = stage_channels
        self.preactivation = preactivation
        self.conv1 = _stem(in_channels, stem_channels, stem_stride)
        if not preactivation:
            self.bn1 = batch_norm(stem_channels, norm=norm)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(block, blocks, stem_channels, first, stride=1)
        self.layer2 = _stage(block, blocks, first, second, stride=2)
        self.layer3 = _stage(block, blocks, second, third, stride=2)
        if preactivation:
            self.bn1 = batch_norm(third, norm=norm)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels  # groups are not divided out
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``[B, in_channels, H, W]`` to logits ``[B, num_classes]``."""
        features = self.conv1(images)
        if not self.preactivation:
            features = self.relu(self.bn1(features))
        features = self.layer1(features)
        features = self.layer2(features)
        features = self.layer3(features)
        if self.preactivation:
            features = self.relu(self.bn1(features))
        # equal to the last bit to the authors' 8x8 pooling at 32x32, which adaptive pooling is not
        pooled = F.avg_pool2d(features, features.shape[2:]).flatten(1)  # [B, C, H, W] -> [B, C]
        logits: torch.Tensor = self.fc(pooled)
        return logits


def _stem(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    if stride <= 2:
        return conv3x3(in_channels, out_channels, stride)
    return nn.Conv2d(
        in_channels, out_channels, kernel_size=2 * stride - 1, stride=stride, padding=stride - 1, bias=False
    )


def _stage(block: MakeBlock, blocks: int, in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    rest = [block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)


def classic_network(
    family: str,
    *,
    basic: MakeBlock,
    bottleneck: MakeBlock,
    block: str,
    depth: int,
    widen_factor: int,
    num_classes: int,
    in_channels: int,
    preactivation: bool,
    stem_stride: int = 1,
    norm: bool = True,
) -> CifarNetwork:
    """Build a network with the widths of He et al.: 16, 32 and 64 channels, or four times that with bottlenecks."""
    require_positive(widen_factor=widen_factor)
    check_choice("block", block, ("bottleneck", "basic"))
    is_basic = block == "basic"
    name = f"{family} with {block} blocks"
    return CifarNetwork(
        basic if is_basic else bottleneck,
        blocks=blocks_per_stage(name, depth, layers_per_block=2 if is_basic else 3, other_layers=2),
        stem_channels=16,
        stage_channels=[width * widen_factor * (1 if is_basic else 4) for width in (16, 32, 64)],
        num_classes=num_classes,
        in_channels=in_channels,
        preactivation=preactivation,
        stem_stride=stem_stride,
        norm=norm,
    )
