"""Checkpoints as data: whatever is read of one, no code is run from it."""

import os
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO


def read_checkpoint(
    source: str | os.PathLike[str] | IO[bytes],
    map_location: Any = None,
    *,
    hparams_file: object = None,
    weights_only: bool | None = None,
) -> tuple[dict[str, Any], str]:
    """Read a checkpoint for ``load_from_checkpoint``, which has these options from Lightning.

    Args:
        source: path or open file.
        map_location: as ``torch.load`` takes it; without a GPU, the CPU by default.
        hparams_file: refused.
        weights_only: refused where it is ``False``.

    Returns:
        What it holds, and a name of the file for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds more than plain data, or an option asks for more than that.
    """
    if weights_only is False:
        raise ValueError(
            "weights_only=False would run code from the checkpoint. Leave it out: checkpoints are read as data."
        )
    if hparams_file is not None:
        raise ValueError(
            f"hparams_file={str(hparams_file)!r} is not read. Pass the options themselves: "
            "load_from_checkpoint(path, NAME=...)."
        )
    place: Any = map_location if map_location is not None or torch.cuda.is_available() else "cpu"
    path = Path(source) if isinstance(source, os.PathLike) else source
    name = str(path) if isinstance(path, str | Path) else "The checkpoint"
    try:
        # said and not left to the default, which an environment variable changes
        if isinstance(path, str | Path):
            content: Any = TorchCheckpointIO().load_checkpoint(path, place, weights_only=True)
        else:
            content = torch.load(path, map_location=place, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        raise ValueError(
            f"{name} cannot be read ({type(error).__name__}): it is damaged, or it holds more than plain data."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no checkpoint of a training run, but holds a {type(content).__name__}.")
    return content, name
