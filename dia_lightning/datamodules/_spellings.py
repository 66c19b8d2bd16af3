"""Compare names as people and file systems do: ignoring Unicode forms, then case and spaces."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence


def plain(name: str) -> str:
    """Return a name in its composed form (NFC): a Mac and its archives write umlauts as two characters."""
    return unicodedata.normalize("NFC", name)


def loose(name: str) -> str:
    """Return a name without letter case, surrounding or repeated spaces, and byte order marks."""
    return plain(" ".join(plain(name).replace("\ufeff", "").split()).casefold())


def same_names(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists have the same names in the same order, regardless of Unicode form."""
    return [plain(name) for name in names] == [plain(name) for name in others]


class Names:
    """Names that can be looked up by other spellings.

    Args:
        names: without duplicates.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = set(names)
        self._plain: defaultdict[str, list[str]] = defaultdict(list)
        self._loose: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._exact:
            self._plain[plain(name)].append(name)
            self._loose[loose(name)].append(name)

    def find(self, name: str) -> str | None:
        """Return the exact name, else the only one that matches by Unicode form, else by letters; else ``None``."""
        if name in self._exact:
            return name
        for found in (self._plain.get(plain(name), []), self._loose.get(loose(name), [])):
            if len(found) == 1:
                return found[0]
        return None


class FileFinder:
    """Finds files on disk by paths that may be spelled differently; every folder is listed only once."""

    def __init__(self) -> None:
        self._listed: dict[str, Names] = {}

    def find(self, path: str) -> str | None:
        """Return the path of an existing file or folder; ``None`` if there is none, or more than one."""
        if os.path.exists(path):
            return path
        head, name = os.path.split(path)
        if not name:
            return self.find(head) if head not in ("", path) else None
        folder = self.find(head) if head else ""
        if folder is None or not os.path.isdir(folder or os.curdir):
            return None
        if folder not in self._listed:
            self._listed[folder] = Names(os.listdir(folder or os.curdir))
        found = self._listed[folder].find(name)
        return None if found is None else os.path.join(folder, found)
