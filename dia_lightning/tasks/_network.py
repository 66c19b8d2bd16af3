"""How a task's network gets its attention."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

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


#: Arguments that every task hands on to ``attach``, beside the attention and its own.
_ATTACHING = ("share", "plug", "branches", "sites", "identity", "branch_norm")


def attach_if_any(network: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Attach attention to a network, in place, or say that options for it are unused.

    Args:
        network: the backbone.
        arguments: those of a task: ``attention``, ``attention_args`` and what :func:`attach` takes beside them.

    Raises:
        ValueError: if it cannot be attached.
    """
    check_is_no_mark("attention", arguments["attention"])
    found = attach_arguments(arguments)
    if found["attention"] is not None:
        attach(network, **found)
    elif arguments["attention_args"] or found["identity"] or found["plug"] is not None or found["share"] == "block":
        rank_zero_info(
            "attention is None: the network is plain, and attention_args, share, plug and identity are unused."
        )


def attach_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``attach`` is called with beside the network; ``attention`` is ``None`` for a plain one.

    Args:
        arguments: those of a task, or its hyperparameters.
    """
    options = {name: arguments[name] for name in ("attention", *_ATTACHING)}
    return dict(**options, **(arguments["attention_args"] or {}))  # refuses a name that is in both
