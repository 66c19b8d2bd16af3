"""Combine the checkpoints of ``--ensemble`` into one task."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dia_lightning.cli.runs.find_checkpoint import find_checkpoint
from dia_lightning.cli.runs.task_of_run import task_of_run
from dia_lightning.tasks import ClassificationTask, EnsembleTask


def member_paths(given: str | Sequence[str], roots: Iterable[Path]) -> list[str]:
    """Find the files that ``--ensemble`` refers to.

    Args:
        given: paths, ``"last"`` or ``"best"``, as a list or separated by commas.
        roots: folders to search for runs.

    Raises:
        ValueError: if one does not exist or is repeated, or there are fewer than two.
    """
    names = given.split(",") if isinstance(given, str) else given
    places = list(roots)
    paths = [find_checkpoint(str(name).strip(), places) for name in names]
    files = [Path(path).resolve() for path in paths]
    twice = [path for path, file in zip(paths, files, strict=True) if files.count(file) > 1]
    if twice or len(paths) < 2:
        wrong = f"{twice[0]} comes twice" if twice else f"there is only {', '.join(paths) or 'nothing'}"
        raise ValueError(f"--ensemble: {wrong}. Give two or more different checkpoints: --ensemble a.ckpt,b.ckpt.")
    return paths


def ensemble_of(paths: Sequence[str]) -> EnsembleTask:
    """Load the members.

    Raises:
        ValueError: if one does not hold a classifier, or the classifiers' classes differ.
        UserError: if a custom class that the config of a run names cannot be imported.
    """
    members = []
    for path in paths:
        member = task_of_run(Path(path))
        if not isinstance(member, ClassificationTask):
            raise ValueError(f"--ensemble is for classification, but {path} holds a {type(member).__name__}.")
        members.append(member)
    return EnsembleTask(members)
