"""Class folders: finding them, and matching them between splits."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning.datamodules._image_files import ImageFiles, find_images, folders_in, joined
from dia_lightning.datamodules._spellings import Names, loose, plain, same_names
from dia_lightning.datamodules._split_warnings import named, warn_of_files_left_out

_NO_SPLITS = frozenset({"dev", "eval", "evaluation", "testing", "training", "valid", "validate", "validation"})

Folders = dict[str, list[Path]]
"""The folders of every class: several if two Unicode forms of a name are mixed."""


def class_folders(folder: Path) -> Folders:
    """Return the folders in a folder, sorted; names that differ only in their Unicode form are one class."""
    forms: Folders = {}
    for name in folders_in(folder, whole=True):
        forms.setdefault(plain(name), []).append(folder / name)
    return {same[0].name: same for same in forms.values()}


def match_folders(found: Folders, classes: Sequence[str], where: Path) -> Folders:
    """Return the folders of a split by class name, in the order of the classes.

    Args:
        found: class folders of the split.
        classes: those of training.
        where: folder of the split, for messages.

    Raises:
        ValueError: if the classes differ from those of training.
    """
    names = Names(classes)
    matched: Folders = {name: [] for name in classes}
    unknown = []
    for name, folders in sorted(found.items(), key=lambda item: item[0] not in matched):  # exact names first
        known = names.find(name)
        if known is None or (matched[known] and plain(name) != plain(known)):
            unknown.append(name)
            continue
        if plain(name) != plain(known):
            rank_zero_warn(f"{where} has the class folder {name!r}, which is taken for {known!r} of training.")
        matched[known] += folders
    if unknown:
        raise ValueError(f"{where} has class(es) that training did not have: {', '.join(sorted(unknown))}.")
    missing = sorted(name for name, folders in matched.items() if not folders)
    if missing:
        raise ValueError(f"{where} lacks class(es) that training had: {', '.join(missing)}.")
    return matched


def files_of(folders: Folders, where: Path) -> dict[str, ImageFiles]:
    """Return the image files of every class, and warn of other files in the folder of the split.

    Raises:
        FileNotFoundError: if a class has none.
    """
    flat = list(folders.values()) == [[where]]
    files = {name: joined([find_images(path, deep=not flat) for path in paths]) for name, paths in folders.items()}
    if empty := [name for name, found in files.items() if not found.paths]:
        raise FileNotFoundError(f"No image in class folder(s) {', '.join(empty)} of {where}.")
    if flat:
        others = joined([find_images(where / name) for name in folders_in(where)])
    else:
        others = find_images(where, deep=False)
    if others.paths:
        place = "folders beside the others" if flat else "no class folder"
        rank_zero_warn(
            f"{len(others.paths)} image(s) in {where} lie in {place} and are left out: {named(others.paths)}."
        )
    warn_of_files_left_out(joined([*files.values(), others]).left_out, where)
    return files


def warn_of_similar(classes: Sequence[str], where: Path) -> None:
    """Warn of classes that may be the same: they differ only in case or spaces (but A and a are two letters)."""
    similar: dict[str, list[str]] = {}
    for name in classes:
        similar.setdefault(loose(name), []).append(name)
    for same in similar.values():
        if len(same) > 1 and len(loose(same[0])) > 1:
            rank_zero_warn(
                f"{where} has the classes {same}, which differ in letter case or blanks alone. Are they one?"
            )


def warn_of_unknown_splits(root: Path) -> None:
    """Warn of folders that look like splits but have unknown names."""
    if found := [name for name in folders_in(root) if loose(name) in _NO_SPLITS]:
        rank_zero_warn(
            f"{root} has {', '.join(found)}, which nobody looks into: splits are train, val and test. Rename it."
        )


def same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists have the same names, regardless of Unicode form and order."""
    return same_names(sorted(names, key=plain), sorted(others, key=plain))
