"""What ``sample`` and ``analyze`` share: a checkpoint, a device, a new folder for the results."""

import argparse
import sys
from pathlib import Path

import torch

from dia_lightning._free_path import free_path
from dia_lightning.cli._errors import PROGRAM, UserError
from dia_lightning.cli.runs.find_checkpoint import find_checkpoint
from dia_lightning.cli.runs.run_of_checkpoint import run_folder_of


def add_arguments(parser: argparse.ArgumentParser, *, out: str, without: str | None = None) -> None:
    """Add the options for the checkpoint, the device, and the folder of the results.

    Args:
        parser: of the command.
        out: the default folder, for the help.
        without: what happens without a checkpoint, for the help; ``None`` if one is required.
    """
    add = parser.add_argument
    which = "a checkpoint file, or 'last' or 'best' for a run's"
    if without is None:
        add("checkpoint", help=which)
    else:
        add("checkpoint", nargs="?", help=f"{which}; without it {without}")
    add("--runs", default="runs", help="folder to search for 'last' and 'best' (default: runs)")
    add("--device", default="auto", choices=("cpu", "cuda", "auto"), help="(default: auto, a GPU if there is one)")
    add("--out", metavar="FOLDER", help=f"a new folder (default: {out} in the folder of the run)")


def checkpoint_of(options: argparse.Namespace) -> Path:
    """Return the checkpoint that the options name, and report it.

    Raises:
        ValueError: if there is no such checkpoint, or the folder for the results is not new.
    """
    check_out_is_new(options)
    return resolved(options.checkpoint, options.runs)


def check_out_is_new(options: argparse.Namespace) -> None:
    """Refuse an existing folder for the results.

    Raises:
        ValueError: if it is.
    """
    if options.out is not None and Path(options.out).exists():
        raise ValueError(f"--out {options.out} exists already, and nothing is overwritten. Give a new folder.")


def resolved(checkpoint: str, runs: str) -> Path:
    """Return the file that a path, ``"last"`` or ``"best"`` refers to, and report it.

    Raises:
        ValueError: if there is none.
    """
    path = find_checkpoint(checkpoint, [Path(runs)])
    sys.stderr.write(f"{PROGRAM}: checkpoint {path}\n")
    return Path(path)


def device_of(options: argparse.Namespace) -> str:
    """Return ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: if a GPU is requested but there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here. Use --device cpu.")
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device: str = options.device
    return device


def new_folder(options: argparse.Namespace, checkpoint: Path, name: str) -> Path:
    """Make a new folder: the given one, or the next free one of the run.

    Args:
        options: the arguments of the command.
        checkpoint: of the run.
        name: of the folder in the folder of the run.

    Raises:
        UserError: if it cannot be made.
    """
    if options.out is not None:
        return _made(Path(options.out))
    place = run_folder_of(checkpoint) / name
    return _made(free_path(place))


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}). Give another folder: --out.") from error
    return folder
