"""Which files are images: the one list of the formats that may be opened, and of their endings."""

import os
from collections.abc import Iterable

from PIL import Image, features

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jfi", ".jfif", ".jif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pjp", ".pjpeg"),
    "PNG": (".apng", ".png"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),  # only where a plugin such as pillow_heif is registered
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "SGI": (".bw", ".rgb", ".rgba", ".sgi"),
    "SUN": (".ras",),
    "TGA": (".icb", ".tga", ".vda", ".vst"),  # last, because its files have no signature
}
"""Only plain rasters: Pillow hands EPS to a program, and WMF, PDF and FPX are documents, whatever their ending."""

_CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
"""Formats that Pillow may have been built without."""

_COMPANIONS = frozenset(
    {".aae", ".bib", ".cfg", ".csv", ".db", ".html", ".ini", ".json", ".lnk", ".log", ".md", ".md5", ".py", ".sha256"}
    | {".tsv", ".txt", ".url", ".xml", ".xmp", ".yaml", ".yml"}
)
_COMPANION_NAMES = frozenset({"authors", "citation", "license", "licence", "md5sums", "readme", "sha256sums"})
_NO_DATA = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


def readable_formats() -> list[str]:
    """Return the formats of :data:`FORMATS` that this Pillow reads."""
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    return [name for name in known if name not in _CODECS or features.check(_CODECS[name])]


def readable_endings() -> frozenset[str]:
    """Return the endings of image files, in lower case."""
    return frozenset(ending for name in readable_formats() for ending in FORMATS[name])


def ending(name: str) -> str:
    """Return the ending of a file name in lower case, with its dot; empty if there is none."""
    return os.path.splitext(name)[1].lower().strip()


def is_companion(name: str) -> bool:
    """Return whether a file is a note, a list or a system file, which nobody takes for data."""
    return ending(name) in _COMPANIONS or name.lower() in _COMPANION_NAMES


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or one that systems and archives leave next to data."""
    return name.startswith(".") or name in _NO_DATA


def count_by_ending(names: Iterable[str]) -> dict[str, int]:
    """Return the number of files of each ending, without hidden ones and notes."""
    counts: dict[str, int] = {}
    for name in names:
        if not is_hidden(name) and not is_companion(name):
            counts[ending(name)] = counts.get(ending(name), 0) + 1
    return counts
