"""Configs by name: a file in the working folder, else one shipped with the package."""

import os
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path, PurePath

_PACKAGE = Path(__file__).parent
#: Inside the package in an installation; next to it in a checkout, which an editable installation reads.
FOLDER = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)


@cache
def config_names() -> Sequence[str]:
    """Return the names of the package's configs, such as ``classification/digits.yaml``."""
    return sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*.yaml"))


def find_config(name: str | Path) -> Path:
    """Return where a config is: in the working folder, else in the package.

    Args:
        name: a path, or the name of one of the package's configs, with or without a leading ``configs/``.

    Returns:
        The path itself if the file exists, or if the package has none of that name either.
    """
    path = Path(name)
    known = path.as_posix().removeprefix("configs/")
    return path if known not in config_names() or path.exists() else FOLDER / known


def is_packaged(path: str) -> bool:
    """Return whether an absolute path is that of one of the package's configs."""
    return FOLDER in Path(path).parents


def no_config(name: str | Path, hint: str = "") -> str:
    """Return the message about a missing config: the nearest names, and where it was looked for.

    Args:
        name: the given path.
        hint: what to add.
    """
    path = Path(name)
    local = [place.as_posix() for place in path.parent.glob("*.yaml")]
    near = sorted({*local, *config_names()}, key=lambda other: -_likeness(path, other))
    same = [other for other in near if PurePath(other).stem == path.stem]
    close = same or [other for other in near if _likeness(path, other) >= 0.6][:3]
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    places = f" Looked in {os.getcwd()} and among the package's configs in {FOLDER} (dia-lightning configs)."
    return f"There is no file {path}.{hint and ' '}{hint}{guess}{places}"


def _likeness(path: Path, other: str) -> float:
    """Return how similar two paths are, in 0..1; a wrong folder counts less than a wrong file name."""
    of_file = SequenceMatcher(None, path.stem, PurePath(other).stem).ratio()
    return 0.0 if of_file < 0.6 else of_file * 0.7 + SequenceMatcher(None, path.as_posix(), other).ratio() * 0.3
