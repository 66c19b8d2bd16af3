"""How a task gets its network."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from dia_lightning.attention import attach
from dia_lightning.models import get_model
from dia_lightning.tasks._hyperparameters import check_is_no_mark
from dia_lightning.tasks._weights import load_weights


def build_network(
    backbone: str | nn.Module,
    backbone_args: dict[str, Any],
    attention: Any,
    attention_args: dict[str, Any],
    *,
    share: Literal["stage", "block"],
    plug: str | Sequence[int] | None,
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
            identity=identity,
            branch_norm=branch_norm,
            **attention_args,
        )
    if init_from is not None:
        rank_zero_info(load_weights(network, init_from))
    return network
