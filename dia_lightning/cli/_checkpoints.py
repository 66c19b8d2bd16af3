"""Which file `--ckpt_path` means, and which of the checkpoint's hyper-parameters a command takes over."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

# `num_classes` comes from the data, and the checkpoint's own weights replace whatever `init_from` would load.
NOT_TAKEN = frozenset({"num_classes", "init_from"})


def resolve(ckpt_path: str, roots: Iterable[Path]) -> str:
    """The file that a `--ckpt_path` value means.

    Args:
        ckpt_path: A path, or `"last"` for the newest resume checkpoint, or `"best"` for the best one of the newest run.
        roots: Folders below which runs are looked for.

    Returns:
        A path to a file that exists.

    Raises:
        ValueError: When there is none, or for a URL.
    """
    if "://" in ckpt_path:
        raise ValueError(
            f"--ckpt_path {ckpt_path}: checkpoints are not loaded from URLs; download it and give the file"
        )
    if ckpt_path == "last":
        return str(_newest(roots, "last*.ckpt", ckpt_path))
    if ckpt_path == "best":
        return str(_best(_newest(roots, "*.ckpt", ckpt_path)))
    if not Path(ckpt_path).exists():
        raise ValueError(f"--ckpt_path {ckpt_path}: no such file; give a path, 'last' or 'best'")
    return ckpt_path


def read(path: str) -> dict[str, Any]:
    """Loads a checkpoint without running code from it; a damaged file is one line."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        kind = type(error).__name__
        raise ValueError(
            f"{path} is no readable checkpoint ({kind}): damaged, or it holds more than weights"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is no checkpoint of a training run: it holds a {type(checkpoint).__name__}")
    return checkpoint


def hyper_parameters(checkpoint: Mapping[str, Any], class_path: str) -> dict[str, Any]:
    """The hyper-parameters that may be taken from a checkpoint: plain values of the class that is being built.

    Class paths in a checkpoint are never imported: whoever wrote the file would choose which code runs here.

    Args:
        checkpoint: What `read` gave.
        class_path: The class that the command or its config names.

    Returns:
        Values by name; empty for the checkpoint of another class.
    """
    found = dict(checkpoint.get("hyper_parameters", {}))
    written_by = str(found.pop("_class_path", class_path))
    if written_by.rpartition(".")[2] != class_path.rpartition(".")[2]:
        return {}
    return {
        name: value
        for name, value in found.items()
        if name not in NOT_TAKEN and not name.startswith("_") and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        # Where an option also takes an object, jsonargparse would import a text such as "package.Class".
        return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value) is None
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return "class_path" not in value and all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, (bool, int, float))


def _newest(roots: Iterable[Path], pattern: str, wanted: str) -> Path:
    folders = list(dict.fromkeys(roots))
    found = [path for root in folders for path in root.rglob(pattern) if path.is_file()]
    if not found:
        places = " or ".join(str(root) for root in folders)
        raise ValueError(f"--ckpt_path {wanted}: there is no {pattern} below {places}; train first or give a path")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path))


def _best(newest: Path) -> Path:
    """The best checkpoint of the run that wrote `newest`, from the record that every checkpoint carries."""
    callbacks = read(str(newest)).get("callbacks", {})
    records = [state for state in callbacks.values() if isinstance(state, dict) and state.get("monitor") is not None]
    for record in records:
        recorded = str(record.get("best_model_path") or "")
        # the run may have been moved: the file beside this one counts before the path of that time
        for candidate in (newest.with_name(os.path.basename(recorded)), Path(recorded)):
            if recorded and candidate.is_file():
                return candidate
    raise ValueError(f"--ckpt_path best: the newest run ({newest.parent}) has no best checkpoint; give a path")
