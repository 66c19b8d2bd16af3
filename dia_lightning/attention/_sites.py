"""Where attention goes in the blocks of known networks."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class SiteRule:
    """Where the residual branches of a block class end.

    Args:
        sites: submodules whose output ends a residual branch, just before the addition, in the order in which they run.
        branch_norm: whether the branch ends without a norm, so that attaching adds one. DIANet's authors do this in
            their pre-activation networks (``bn_additional``).
        zero_bias: whether linear layers of the unit start with a zero bias, as they do in the authors' network.
    """

    sites: tuple[str, ...]
    branch_norm: bool = False
    zero_bias: bool = False


#: Qualified name of a block class -> its rule. Names instead of classes, so that nothing is imported for it.
#: Subclasses follow the rule of their nearest base class.
SITE_RULES = {
    "dia_lightning.models.cifar_resnet.BasicBlock": SiteRule(("bn2",)),
    "dia_lightning.models.cifar_resnet.Bottleneck": SiteRule(("bn3",)),
    "dia_lightning.models.cifar_preresnet.BasicBlock": SiteRule(("conv2",), branch_norm=True),
    "dia_lightning.models.cifar_preresnet.Bottleneck": SiteRule(("conv3",), branch_norm=True),
    "dia_lightning.models.cifar_wrn.BasicBlock": SiteRule(("conv2",), branch_norm=True, zero_bias=True),
    "dia_lightning.models.cifar_resnext.Bottleneck": SiteRule(("bn3",), zero_bias=True),
    "torchvision.models.resnet.BasicBlock": SiteRule(("bn2",)),
    "torchvision.models.resnet.Bottleneck": SiteRule(("bn3",)),
}


@dataclass(frozen=True)
class Place:
    """A block that attention can be attached to."""

    path: str  # of the block, from the root of the network
    block: nn.Module
    rule: SiteRule
    channels: int

    @property
    def stage(self) -> tuple[str, int]:
        """Blocks that follow one another in one container with one width form a stage."""
        return self.path.rpartition(".")[0], self.channels


def site_rule(block_class: type) -> SiteRule | None:
    """Return the rule of a block class or of its nearest known base class."""
    for base in block_class.__mro__:
        rule = SITE_RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule
    return None


def find_places(model: nn.Module) -> Iterator[Place]:
    """Yield the blocks of a network that have a rule, in the order in which they are registered."""
    for path, module in model.named_modules():
        rule = site_rule(type(module))
        if rule is not None:
            yield Place(path, module, rule, width(module.get_submodule(rule.sites[0])))


def width(site: nn.Module) -> int:
    """Return the number of channels that a site puts out."""
    for name in ("num_features", "out_channels", "out_features"):
        value = getattr(site, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(
        f"The width of {type(site).__name__} is unknown: it has no num_features, out_channels or out_features."
    )
