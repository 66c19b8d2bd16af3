"""Text files as written by editors and shells on any system."""

import codecs
from pathlib import Path


def read_text(path: str | Path) -> str:
    """Read a file in UTF-8, with or without a byte order mark, or in UTF-16 with one, as written by PowerShell's ``>``.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is in neither encoding.
    """
    content = Path(path).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    return text.replace("\r\n", "\n")
