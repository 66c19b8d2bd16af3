"""Where the paths in an annotation file may lead."""

import os
import stat


class Enclosure:
    """Checks whether files are in a folder, following symbolic links.

    The folder itself may be a link, for example to another disk: the user named it. A link below it that leads
    elsewhere may have come with the data, and would let their author choose what is read.

    Args:
        folder: its own path may have links.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._root = os.path.realpath(folder)
        self._folders: dict[str, bool] = {}

    def has(self, path: str) -> bool:
        """Return whether a file is in the folder; each folder on the way is resolved once, each file by one call."""
        place = os.path.dirname(path)
        if place not in self._folders:
            self._folders[place] = self._is_below(os.path.realpath(place))
        if not self._folders[place]:
            return False
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except (OSError, ValueError):  # it does not exist, which is reported elsewhere
            return True
        return not is_link or self._is_below(os.path.realpath(path))

    def _is_below(self, real: str) -> bool:
        return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)
