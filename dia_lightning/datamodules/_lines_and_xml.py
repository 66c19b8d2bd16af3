"""Read lists and annotations written on any system."""

import re
from pathlib import Path
from xml.etree import ElementTree

from dia_lightning._text import read_text


def read_lines(file: Path) -> list[str]:
    """Return the stripped lines of a list, without empty ones and comments (``# ...``).

    Raises:
        ValueError: if the file is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    lines = [line.strip() for line in read_text(file).splitlines()]
    return [line for line in lines if line and not line.startswith("# ") and line != "#"]


def read_xml(file: str) -> ElementTree.Element:
    """Return the root of an XML file.

    Raises:
        ValueError: if it cannot be read; the message names it.
    """
    content = Path(file).read_bytes().lstrip()
    try:
        try:
            return ElementTree.fromstring(content)
        except ValueError:  # a multi-byte encoding that Python has but the parser lacks
            return ElementTree.fromstring(content.decode(_declared_encoding(content)))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{file} is not valid XML ({error}). Fetch or write it again.") from error


def _declared_encoding(content: bytes) -> str:
    found = re.search(rb"""encoding=["']([\w.-]+)["']""", content[:200])
    return "utf-8" if found is None else found[1].decode()
