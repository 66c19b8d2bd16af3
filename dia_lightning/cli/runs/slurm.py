"""Automatic resuming in a requeued SLURM job."""

import os
import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from dia_lightning._checkpoint_file import damage_of
from dia_lightning.cli.runs.run_of_checkpoint import RECORD, head


def job_of(args: Sequence[str]) -> str | None:
    """Return an id for a command of a job, which may run several; ``None`` outside of SLURM.

    Args:
        args: as in a shell.
    """
    number = os.environ.get("SLURM_JOB_ID")  # each job of an array has its own, and keeps it when requeued
    return None if number is None else f"{number} {sha256(chr(0).join(args).encode()).hexdigest()[:16]}"


def saved_before_requeue(job: str | None, roots: Iterable[Path]) -> Path | None:
    """Return the newest intact checkpoint that a command wrote before its job was requeued.

    Args:
        job: from :func:`job_of`.
        roots: folders that contain its runs.
    """
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    files = {path for root in roots for path in root.rglob("*.ckpt") if path.is_file()}
    newest_first = sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in newest_first if _goes_on(path, job) and damage_of(path) is None), None)


def taken_by_lightning(folder: Path) -> list[Path]:
    """Return the checkpoints of which Lightning loads the first in a SLURM job, regardless of which job wrote it.

    Args:
        folder: the trainer's ``default_root_dir``.
    """
    found = [path for path in folder.glob("hpc_ckpt_*.ckpt") if re.fullmatch(r"hpc_ckpt_\d+", path.stem)]
    found.sort(key=lambda path: int(path.stem.rpartition("_")[2]), reverse=True)
    return found if found and SLURMEnvironment.detect() else []


def is_of_other_job(checkpoint: Path, job: str | None) -> bool:
    """Return whether a checkpoint records that another job, or another command of this one, wrote it."""
    return _record(head(checkpoint)).get("job", job) != job


def _goes_on(path: Path, job: str) -> bool:
    found = head(path)
    return _record(found).get("job") == job and "optimizer_states" in found


def _record(checkpoint: dict[str, Any]) -> dict[str, Any]:
    record = checkpoint.get(RECORD)
    return record if isinstance(record, dict) else {}
