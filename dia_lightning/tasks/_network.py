"""How a task gets its network."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.attention import attach
from dia_lightning.models import get_model
from dia_lightning.tasks._weights import load_weights

# The command line knows networks by name only: from the types of objects its help would list every module of torch.
if TYPE_CHECKING:
    Backbone: TypeAlias = str | nn.Module
    Attention: TypeAlias = str | Callable[[int], nn.Module]
else:
    Backbone = Attention = str


def build_network(
    backbone: Backbone,
    backbone_args: dict[str, Any],
    attention: Attention | None,
    attention_args: dict[str, Any],
    *,
    share: Literal["stage", "block"],
    plug: str | Sequence[int] | None,
    branches: Sequence[Literal["conv", "attention", "mlp"]] | None,
    sites: str | Sequence[str] | None,
    identity: bool,
    branch_norm: bool | None,
    init_from: str | None,
) -> nn.Module:
    """Make a backbone, attach attention and load weights, in the order that keeps plain weights loadable.

    Raises:
        ValueError: if arguments are given for something that is not built here.
    """
    check_is_no_mark("backbone", backbone)
    check_is_no_mark("attention", attention)
    network = get_model(backbone, **backbone_args) if isinstance(backbone, str) else backbone
    if attention is not None:
        attach(
            network,
            attention,
            share=share,
            plug=plug,
            branches=branches,
            sites=sites,
            identity=identity,
            branch_norm=branch_norm,
            **attention_args,
        )
    elif identity or attention_args or plug is not None or share == "block":
        rank_zero_info(
            "attention is None: the network is plain, and attention_args, share, plug and identity are unused."
        )
    if init_from is not None:
        rank_zero_info(load_weights(network, init_from))
    return network
