"""Messages for a checkpoint that does not fit the network or the command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dia_lightning import _checkpoint_kind
from dia_lightning.cli.runs.read_checkpoint import without_files
from dia_lightning.cli.runs.run_of_checkpoint import config_of

# The options that determine a network's weights: its architecture, and where attention goes.
BACKBONE = ("backbone", "backbone_args", "detector")
ATTENTION = ("attention", "attention_args", "share", "plug", "branches", "sites", "existing", "identity", "branch_norm")


def check_fits(given: Mapping[str, Any], found: Mapping[str, Any], path: str) -> None:
    """Compare the options that determine the weights, before hundreds of weight names mismatch.

    Args:
        given: hyper-parameters that the user gave, by name.
        found: those of the checkpoint.
        path: the checkpoint, for the message.

    Raises:
        ValueError: if the network would differ from the checkpoint's.
    """
    given = without_files(given, found)
    plain = given.get("attention", found.get("attention")) is None and found.get("attention") is None
    names = BACKBONE if plain else (*BACKBONE, *ATTENTION)
    # an object given in Python is saved as "object:Name"; here it has another name
    known = [name for name in names if name in given and name in found and "object:" not in repr(found[name])]
    for name in known:
        # empty arguments may be null or {}
        if given[name] != found[name] and not (given[name] in ({}, None) and found[name] in ({}, None)):
            raise ValueError(
                f"--model.{name} {given[name]!r} makes another network than that of the checkpoint, which has "
                f"{found[name]!r}. To go on with the checkpoint {_own_config(path, 'leave it out')}; or take weights "
                f"only, with --model.init_from {path} instead of --ckpt_path."
            )


def check_attention_is_named(given: Mapping[str, Any], checkpoint: Mapping[str, Any], path: str) -> None:
    """Ask for the attention of a checkpoint if it is a custom class, which a checkpoint may not import.

    Args:
        given: hyper-parameters that the user gave, by name.
        checkpoint: from :func:`read_checkpoint`.
        path: the checkpoint, for the message.

    Raises:
        ValueError: if it was not given.
    """
    attention = checkpoint.get("hyper_parameters", {}).get("attention")
    if isinstance(attention, str) and "." in attention and given.get("attention") != attention:
        raise ValueError(
            f"The attention of the checkpoint is {attention}, and a class is not imported because a checkpoint says "
            f"so. If it is yours, {_own_config(path, f'give it: --model.attention {attention}')}."
        )


def misfit(message: str, path: str | None) -> str:
    """Summarize torch's list of weights that do not fit a network in one sentence.

    Args:
        message: torch's.
        path: the checkpoint.
    """
    return (
        f"The weights of {path} do not fit the network of this command ({_checkpoint_kind.misfit(message)}). To use "
        f"them {_own_config(str(path), 'give the options that the network was trained with')}."
    )


def is_while_restoring(error: BaseException) -> bool:
    """Return whether an error occurred while Lightning restored a checkpoint."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "lightning.pytorch.trainer.connectors.checkpoint_connector":
            return True
        trace = trace.tb_next
    return False


def not_restored(error: BaseException, path: str) -> str:
    """Summarize in one sentence the error of Lightning or a callback about a checkpoint that it cannot restore.

    Args:
        error: what was raised.
        path: the checkpoint.
    """
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return (
        f"{path} is no checkpoint that this command can go on from ({said}): it was changed, or another program wrote "
        f"it. Give the .ckpt as fit wrote it; DIA_TRACEBACK=1 shows the whole trace."
    )


def _own_config(path: str, otherwise: str) -> str:
    config = config_of(Path(path))
    return f"use the config of its run, -c {config}" if config.is_file() else otherwise
