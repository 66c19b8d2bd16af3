"""Configs by name: a file of the working folder, else one that comes with the package."""

import os
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path, PurePath

_PACKAGE = Path(__file__).parent
#: In an installation they are inside of the package, in a checkout, which an editable installation reads, beside it.
FOLDER = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)


@cache
def config_names() -> Sequence[str]:
    """Return the names of the package's configs, such as ``classification/digits.yaml``."""
    return sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*.yaml"))


def find_config(name: str | Path) -> Path:
    """Return where a config is: in the working folder, else in the package.

    Args:
        name: a path, or the name of one of the package's, with ``configs/`` before it or without.

    Returns:
        The path itself if there is such a file, or none of that name in the package either.
    """
    path = Path(name)
    known = path.as_posix().removeprefix("configs/")
    return path if known not in config_names() or path.exists() else FOLDER / known


def is_packaged(path: str) -> bool:
    """Tell whether an absolute path is that of one of the package's configs."""
    return FOLDER in Path(path).parents


def no_config(name: str | Path, hint: str = "") -> str:
    """Return the sentences about a config that is not there: the nearest names, and where they were looked for.

    Args:
        name: the path that was given.
        hint: what to say beside.
    """
    path = Path(name)
    local = [place.as_posix() for place in path.parent.glob("*.yaml")]
    near = sorted({*local, *config_names()}, key=lambda other: -_likeness(path, other))
    close = [other for other in near if _likeness(path, other) >= 0.6][:3]
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    places = f" Looked in {os.getcwd()} and among the package's configs in {FOLDER} (dia-lightning configs)."
    return f"There is no file {path}.{hint and ' '}{hint}{guess}{places}"


def _likeness(path: Path, other: str) -> float:
    """Return how alike two paths are, in 0..1; a wrong folder counts less than a wrong name of the file."""
    of_file = SequenceMatcher(None, path.stem, PurePath(other).stem).ratio()
    return 0.0 if of_file < 0.6 else of_file * 0.7 + SequenceMatcher(None, path.as_posix(), other).ratio() * 0.3
