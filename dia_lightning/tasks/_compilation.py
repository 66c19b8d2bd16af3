"""What ``compile`` means for a task: which modules of its network are compiled in place."""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch._dynamo
from torch import nn

from dia_lightning.attention import find_sites, is_attached
from dia_lightning.attention.inspection import attached_blocks, takes_what_is_known

Compile: TypeAlias = bool | Literal["blocks"]

#: How many graphs torch allows one function by default. A kind of block takes five or six: training and evaluation,
#: each for the first size of a batch and then for any, evaluation of a single image, and evaluation without a Trainer.
_GRAPHS = 8


def parts_to_compile(compile: Compile, whole: nn.Module, network: nn.Module, example: Any = None) -> list[nn.Module]:
    """Return the modules to compile; call it before attaching attention, so that all arms compile the same ones.

    Args:
        compile: the user's option.
        whole: what ``True`` means.
        network: contains the residual blocks that ``"blocks"`` refers to.
        example: an input of the network, if :func:`find_sites` does not know it.

    Raises:
        ValueError: if ``compile`` is something else, or the network has no residual blocks.
    """
    if compile not in (False, True, "blocks"):
        raise ValueError(f"compile must be False, True or 'blocks', got {compile!r}.")
    if compile == "blocks":
        return _residual_blocks(network, example)
    return [whole] if compile else []


def compile_in_place(parts: Iterable[nn.Module]) -> None:
    """Compile modules when they first run; those already compiled are left unchanged.

    The names of their weights do not change. Copies, including those sent to other processes, are not compiled.
    """
    new = [part for part in parts if part._compiled_call_impl is None]
    # Torch counts the graphs of all modules that are compiled in place together, since one of its functions calls them
    # all, and runs whatever exceeds the limit uncompiled. Its limit per call of compile() is newer than torch 2.11.
    config: Any = torch._dynamo.config
    config.recompile_limit += _GRAPHS * len(new)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    for part in new:
        part.compile()


def _residual_blocks(network: nn.Module, example: Any) -> list[nn.Module]:
    if is_attached(network):  # by the user
        return [*attached_blocks(network)]
    try:
        stages = find_sites(network, None if takes_what_is_known(network) else example)
    except ValueError as error:
        raise ValueError(f"{_no_blocks(network)} Looking for some: {error}") from error
    paths = dict.fromkeys(site.block for stage in stages for site in stage)
    if not paths:
        raise ValueError(_no_blocks(network))
    return [network.get_submodule(path) for path in paths]


def _no_blocks(network: nn.Module) -> str:
    return (
        f"compile='blocks' finds no residual block in this {type(network).__name__}. Compile it as a whole: "
        "compile=True (--model.compile true)."
    )
