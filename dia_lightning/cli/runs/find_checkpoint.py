"""Which checkpoint a path, ``last`` or ``best`` refers to."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from dia_lightning._checkpoint_file import damage_of, newest_older
from dia_lightning.cli._errors import PROGRAM
from dia_lightning.cli.runs.run_of_checkpoint import head


def find_checkpoint(ckpt_path: str, roots: Iterable[Path], *, announce: bool = True) -> str:
    """Find the file that a ``--ckpt_path`` value refers to.

    Args:
        ckpt_path: a path; ``"last"`` for the newest ``last*.ckpt``, or the newest checkpoint if there is none;
            ``"best"`` for the best one of the newest run. If the newest is damaged, the newest intact one before it
            is used instead.
        roots: folders to search for runs.
        announce: whether to report that on stderr.

    Returns:
        An existing path: a file, or the folder of a sharded checkpoint.

    Raises:
        ValueError: if there is none, for a URL, or for a folder of checkpoints.
    """
    if "://" in ckpt_path:
        raise ValueError(
            f"Checkpoint {ckpt_path}: checkpoints are not loaded from URLs. Download it and give the file."
        )
    roots = list(roots)
    if ckpt_path == "last":
        return str(_whole(_newest(roots, ["last*.ckpt", "*.ckpt"], ckpt_path), roots, announce))
    if ckpt_path == "best":
        return str(_best(_whole(_newest(roots, ["*.ckpt"], ckpt_path), roots, announce)))
    if not Path(ckpt_path).exists():
        raise ValueError(f"Checkpoint {ckpt_path}: there is no such file. Give a path, 'last' or 'best'.")
    inside = sorted(Path(ckpt_path).rglob("*.ckpt"))  # of a folder; a sharded checkpoint has none
    if inside:
        raise ValueError(f"Checkpoint {ckpt_path} is a folder of checkpoints. Give one of them, such as {inside[-1]}.")
    if Path(ckpt_path).is_dir() and not Path(ckpt_path, "meta.pt").is_file():
        raise ValueError(f"Checkpoint {ckpt_path} is a folder without a checkpoint. Give a file, 'last' or 'best'.")
    return ckpt_path


def _newest(roots: Iterable[Path], patterns: Iterable[str], wanted: str) -> Path:
    """Return the newest file of the first pattern that matches any file."""
    folders = list(dict.fromkeys(roots))
    for pattern in patterns:
        found = [path for root in folders for path in root.rglob(pattern) if path.is_file()]
        if found:
            return max(found, key=lambda path: (path.stat().st_mtime_ns, path))
    places = " or ".join(str(root) for root in folders)
    raise ValueError(f"Checkpoint {wanted}: there is no checkpoint below {places}. Train first or give a path.")


def _whole(newest: Path, roots: Iterable[Path], announce: bool) -> Path:
    """Return the newest checkpoint; if it is damaged, the newest intact one before it, if any."""
    damage = damage_of(newest)
    older = damage and newest_older(newest, (path for root in roots for path in root.rglob("*.ckpt")))
    if not older:
        return newest
    if announce:
        line = f"{newest} is damaged, {damage}: using {older}, the newest older one that is whole"
        sys.stderr.write(f"{PROGRAM}: {line}\n")
    return older


def _best(newest: Path) -> Path:
    """Return the best checkpoint of the run that wrote ``newest``, from the record that every checkpoint carries."""
    callbacks = head(newest).get("callbacks", {})
    records = [state for state in callbacks.values() if isinstance(state, dict) and state.get("monitor") is not None]
    for record in records:
        recorded = str(record.get("best_model_path") or "")
        if not recorded:  # it was never validated
            continue
        # the run may have been moved: a file next to this one takes precedence over the recorded path
        for candidate in (newest.with_name(os.path.basename(recorded)), Path(recorded)):
            if candidate.is_file():
                return candidate
    raise ValueError(
        f"Checkpoint best: the newest run ({newest.parent}) has no best checkpoint, perhaps because it was never "
        "validated. Use last, or give a path."
    )
