"""What a run cannot reveal about the blocks of a network: the authors' own sites, norms and initialization.

The sites of the four CIFAR families are those of the DIANet authors; ResNets for larger images follow from them.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BlockRule:
    """Where the only residual branch of a block class ends. The block's first argument is the shortcut.

    Args:
        site: path of the layer, relative to the block.
        width: path of a layer whose number of channels to use; by default the site.
        branch_norm: whether the branch ends without a norm, so that attaching adds one. DIANet's authors do this in
            their pre-activation networks (``bn_additional``).
        zero_bias: whether linear layers of the unit start with a zero bias, as they do in the authors' network.
    """

    site: str
    width: str = ""
    branch_norm: bool = False
    zero_bias: bool = False


#: Qualified name of a block class -> its rule. Names rather than classes, to avoid imports.
BLOCK_RULES = {
    "dia_lightning.models.cifar_resnet.BasicBlock": BlockRule("bn2", width="conv2"),  # norms may be left out
    "dia_lightning.models.cifar_resnet.Bottleneck": BlockRule("bn3", width="conv3"),
    "dia_lightning.models.cifar_preresnet.BasicBlock": BlockRule("conv2", branch_norm=True),
    "dia_lightning.models.cifar_preresnet.Bottleneck": BlockRule("conv3", branch_norm=True),
    "dia_lightning.models.cifar_wrn.BasicBlock": BlockRule("conv2", branch_norm=True, zero_bias=True),
    "dia_lightning.models.cifar_resnext.Bottleneck": BlockRule("bn3", zero_bias=True),
    "torchvision.models.resnet.BasicBlock": BlockRule("bn2"),
    "torchvision.models.resnet.Bottleneck": BlockRule("bn3"),
}

#: Blocks of diffusers U-Nets, which also have residual blocks. They get attention only on request, or if the network
#: has no other blocks, as in a DiT.
OPTIONAL_BLOCKS = {
    "diffusers.models.attention_processor.Attention",
    "diffusers.models.attention.BasicTransformerBlock",
}


def rule_of(block: nn.Module) -> tuple[BlockRule | None, type[nn.Module]]:
    """Return the rule of a block, and the class it was written for."""
    for base in type(block).__mro__:
        rule = BLOCK_RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule, base
    return None, type(block)


def is_optional(block: nn.Module) -> bool:
    """Return whether a block gets attention only on request."""
    return any(f"{base.__module__}.{base.__qualname__}" in OPTIONAL_BLOCKS for base in type(block).__mro__)
