"""How a task's network gets its attention."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dia_lightning._hyperparameters import check_is_no_mark
from dia_lightning.attention import attach
from dia_lightning.attention.inspection import needs_example, parameters_saved

# The command line knows networks by name only: from the types of objects its help would list every module of torch.
if TYPE_CHECKING:
    Backbone: TypeAlias = str | nn.Module
    Attention: TypeAlias = str | Callable[[int], nn.Module]
else:
    Backbone = Attention = str


#: Arguments that every task hands on to ``attach``, beside the attention and its own.
_ATTACHING = ("share", "plug", "branches", "sites", "existing", "identity", "branch_norm")


def attach_if_any(network: nn.Module, arguments: Mapping[str, Any], example: Any = None) -> None:
    """Attach attention to a network, in place, or say that options for it are unused.

    Args:
        network: the backbone.
        arguments: those of a task: ``attention``, ``attention_args`` and what :func:`attach` takes beside them.
        example: what the backbone takes, for one that :func:`attach` does not know.

    Raises:
        ValueError: if it cannot be attached.
    """
    check_is_no_mark("attention", arguments["attention"])
    found = attach_arguments(arguments)
    if found["attention"] is not None or found["existing"] != "keep":
        attach(network, example=example if needs_example(network) else None, **found)
        if found["existing"] == "share":
            rank_zero_info(f"existing='share' saves {parameters_saved(network):,} parameters of attention modules.")
    elif arguments["attention_args"] or found["identity"] or found["plug"] is not None or found["share"] == "block":
        rank_zero_info(
            "attention is None: the network is plain, and attention_args, share, plug and identity are unused."
        )


def images_like(network: nn.Module, shape: Sequence[int] | None) -> Tensor:
    """Return two images ``[2, C, H, W]`` on the meta device, of a shape (C, H, W), or of one that is usual."""
    channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), 3)
    return torch.empty(2, *(shape or (channels, 224, 224)), device="meta")


def attach_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``attach`` is called with beside the network; ``attention`` is ``None`` for a plain one.

    Args:
        arguments: those of a task, or its hyperparameters.
    """
    defaults = {"existing": "keep"}  # of checkpoints that are older than the option
    options = {name: arguments[name] for name in ("attention", *_ATTACHING) if name in arguments}
    options = {**defaults, **options}
    return dict(**options, **(arguments["attention_args"] or {}))  # refuses a name that is in both
