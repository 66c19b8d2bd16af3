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


#: Arguments that every task hands on to ``attach``.
_ATTACHING = ("share", "plug", "branches", "sites", "identity", "branch_norm")


def attach_if_any(network: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Attach attention to a network, in place, or say that options for it are unused.

    Args:
        network: the backbone.
        arguments: those of a task: ``attention``, ``attention_args`` and what :func:`attach` takes beside them.

    Raises:
        ValueError: if it cannot be attached.
    """
    attention, attention_args = arguments["attention"], arguments["attention_args"] or {}
    options = {name: arguments[name] for name in _ATTACHING}
    check_is_no_mark("attention", attention)
    if attention is not None:
        attach(network, attention, **options, **attention_args)
    elif options["identity"] or attention_args or options["plug"] is not None or options["share"] == "block":
        rank_zero_info(
            "attention is None: the network is plain, and attention_args, share, plug and identity are unused."
        )
