"""How a task's network gets its attention."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.attention import attach

# The command line knows networks by name only: from the types of objects its help would list every module of torch.
if TYPE_CHECKING:
    Backbone: TypeAlias = str | nn.Module
    Attention: TypeAlias = str | Callable[[int], nn.Module]
else:
    Backbone = Attention = str


def attach_if_any(
    network: nn.Module,
    attention: Attention | None,
    attention_args: dict[str, Any],
    *,
    share: Literal["stage", "block"],
    plug: str | Sequence[int] | None,
    branches: Sequence[Literal["conv", "attention", "mlp"]] | None,
    sites: str | Sequence[str] | None,
    identity: bool,
    branch_norm: bool | None,
) -> None:
    """Attach attention to a network, in place, or say that options for it are unused.

    Raises:
        ValueError: if it cannot be attached.
    """
    check_is_no_mark("attention", attention)
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
