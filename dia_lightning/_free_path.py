"""The next free name, so that nothing is overwritten."""

from collections.abc import Callable
from itertools import chain, count
from pathlib import Path


def free_path(path: Path, is_taken: Callable[[Path], bool] = Path.exists) -> Path:
    """Return the path itself, or the first of ``name-v1.suffix``, ``name-v2.suffix``, ... that is free.

    Args:
        path: of a file or folder.
        is_taken: whether a path is taken.

    Example:
        >>> taken = {Path("config.yaml"), Path("config-v1.yaml")}
        >>> free_path(Path("config.yaml"), lambda path: path in taken).name
        'config-v2.yaml'
    """
    numbered = (path.with_name(f"{path.stem}-v{number}{path.suffix}") for number in count(1))
    return next(place for place in chain([path], numbered) if not is_taken(place))
