"""Which run a checkpoint belongs to, where the files of that run are, and whether it can continue there."""

import os
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
RECORD = "dia_run"  # key of a checkpoint's record of its run
START = "# The training went on with this config from step "  # first line of a config of a run that goes on


@dataclass(frozen=True)
class RunSource:
    """The run that wrote a checkpoint.

    Args:
        checkpoint: the file, or the folder of a sharded checkpoint.
        step: of the checkpoint.
        folder: of the run; ``None`` if unknown, for example for a file that was copied elsewhere.
        later: the checkpoint from which the run would resume, if it is a later one.
        versions: those of the run's loggers, by their ``root_dir``; empty if the run was moved.
        states: of the callbacks, by key; the latest that the run left on disk.
        busy: whether another training is writing to its folder.
    """

    checkpoint: Path
    step: int
    folder: Path | None = None
    later: Path | None = None
    versions: Mapping[str, int | str] = field(default_factory=dict)
    states: Mapping[str, Any] = field(default_factory=dict)
    busy: bool = False

    @property
    def obstacle(self) -> str | None:
        """Why no training can continue in the folder of the run; ``None`` if it can."""
        if self.folder is None:
            return f"{self.checkpoint} is not in the folder of a run"
        if self.later is not None:
            return f"{self.folder} has a later checkpoint, {self.later.name}"
        if self.busy:
            return f"another training is writing to {self.folder}"
        if not all(os.access(place, os.W_OK) for place in (self.folder, self.place)):
            return f"{self.folder} is write-protected"
        return None

    @property
    def place(self) -> Path:
        """The folder of the run's checkpoints."""
        return checkpoints_of(self.checkpoint)


def source_of(path: str, checkpoint: Mapping[str, Any]) -> RunSource:
    """Find the run of a checkpoint.

    Args:
        path: of the checkpoint.
        checkpoint: what it holds.
    """
    file, step = Path(path), int(checkpoint.get("global_step", 0))
    record = _record(checkpoint)
    folder = _folder(file, checkpoint, record.get("folder"))
    later = None if folder is None else _later(file, step)
    states = dict(checkpoint.get("callbacks", {}))
    if folder is not None and later is None:
        states |= _newer_states(file, step)
    stayed = folder is not None and "folder" in record and is_same(record["folder"], folder)
    return RunSource(file, step, folder, later, record.get("versions", {}) if stayed else {}, states)


def checkpoints_of(checkpoint: Path) -> Path:
    """Return the folder of the run's checkpoints, or the file's if it was copied elsewhere."""
    # a metric in a file name, "epoch=1-val/acc=0.9.ckpt", makes a folder
    above = (place for place in checkpoint.parents if place.name == CHECKPOINTS and (place.parent / CONFIG).is_file())
    return next(above, checkpoint.parent)


def run_folder_of(checkpoint: Path) -> Path:
    """Return the folder of the run that wrote a checkpoint."""
    place = checkpoints_of(checkpoint)
    return place.parent if place.name == CHECKPOINTS else place


def head(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint, with the weights left on disk; empty if it cannot be read."""
    file = path / "meta.pt" if path.is_dir() else path  # Lightning's name in sharded checkpoints
    try:
        found = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception:  # a damaged file may raise anything; nothing can resume from it
        return {}
    return found if isinstance(found, dict) else {}


def config_of(checkpoint: Path) -> Path:
    """Return the config of the run that wrote a checkpoint, from its latest start by then; it may not exist."""
    folder, step = run_folder_of(checkpoint), int(head(checkpoint).get("global_step", 0))
    later = [
        (start, path.stat().st_mtime_ns, path) for path in folder.glob("config-v*.yaml") if (start := _start(path))
    ]
    return max((item for item in later if item[0] < step), default=(0, 0, folder / CONFIG))[-1]


def _start(config: Path) -> int | None:
    with config.open(encoding="utf-8") as file:
        found = re.fullmatch(f"{START}(\\d+)", file.readline().rstrip())
    return None if found is None else int(found[1])


def is_same(one: str | Path, other: str | Path) -> bool:
    """Return whether two paths are the same place."""
    return os.path.realpath(one) == os.path.realpath(other)


def _record(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    record = checkpoint.get(RECORD)
    kinds = {"folder": str, "config": str, "versions": dict}
    known = record.items() if isinstance(record, dict) else ()
    return {name: value for name, value in known if isinstance(value, kinds.get(name, object))}


def _folder(file: Path, checkpoint: Mapping[str, Any], recorded: str | None) -> Path | None:
    place = checkpoints_of(file)
    if place.name == CHECKPOINTS and (place.parent / CONFIG).is_file():
        return place.parent  # even if a run was moved
    written_to = [state["dirpath"] for state in _checkpoint_states(checkpoint)]
    if recorded is not None and any(is_same(folder, place) for folder in written_to):
        return Path(recorded) if Path(recorded, CONFIG).is_file() else None
    return None


def _checkpoint_states(checkpoint: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and isinstance(state.get("dirpath"), str):
            yield state


def _later(file: Path, step: int) -> Path | None:
    """Return the checkpoint from which the run would resume, as ``last`` finds it, if it is a later one."""
    folder = checkpoints_of(file)
    candidates = list(folder.rglob("last*.ckpt")) or list(folder.rglob("*.ckpt"))
    steps = {path: int(head(path).get("global_step", 0)) for path in candidates if path != file}
    newest = max(steps, key=lambda path: steps[path], default=file)
    return newest if steps.get(newest, step) > step else None


def _newer_states(file: Path, step: int) -> dict[str, Any]:
    """Return the states of callbacks in files written after this one, at its step or a later one.

    The file knows nothing of a best checkpoint that was written after it.
    """
    written = file.stat().st_mtime_ns
    place = checkpoints_of(file)
    others = [path for path in place.rglob("*.ckpt") if path != file and path.stat().st_mtime_ns >= written]
    heads = [(head(path), path.stat().st_mtime_ns) for path in others]
    heads = [item for item in heads if int(item[0].get("global_step", -1)) >= step]
    heads.sort(key=lambda item: (item[0]["global_step"], item[1]))
    return {
        key: deepcopy(state)  # otherwise its values stay in a file that may be overwritten
        for found, _ in heads
        for key, state in found.get("callbacks", {}).items()
        if isinstance(state, dict) and state.get("monitor") is not None
    }
