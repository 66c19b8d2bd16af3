"""The checkpoints of ``--ensemble``, as one task."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dia_lightning.cli import _checkpoints
from dia_lightning.tasks import ClassificationTask, EnsembleTask, load_task


def member_paths(given: str | Sequence[str], roots: Iterable[Path]) -> list[str]:
    """Find the files that ``--ensemble`` means.

    Args:
        given: paths, ``"last"`` or ``"best"``, as a list or parted by commas.
        roots: folders below which runs are looked for.

    Raises:
        ValueError: if one is not there or comes twice, or there are fewer than two.
    """
    names = given.split(",") if isinstance(given, str) else given
    places = list(roots)
    paths = [_checkpoints.resolve(str(name).strip(), places) for name in names]
    twice = [path for i, path in enumerate(paths) if Path(path).resolve() in map(Path.resolve, map(Path, paths[:i]))]
    if twice or len(paths) < 2:
        wrong = f"{twice[0]} comes twice" if twice else f"there is only {', '.join(paths) or 'nothing'}"
        raise ValueError(f"--ensemble: {wrong}. Give two or more different checkpoints: --ensemble a.ckpt,b.ckpt.")
    return paths


def ensemble_of(paths: Sequence[str]) -> EnsembleTask:
    """Load the members.

    Raises:
        ValueError: if one holds something else than a classifier, or classifiers do not know the same classes.
    """
    members = []
    for path in paths:
        member = load_task(path)
        if not isinstance(member, ClassificationTask):
            raise ValueError(f"--ensemble is for classification, but {path} holds a {type(member).__name__}.")
        members.append(member)
    return EnsembleTask(members)
