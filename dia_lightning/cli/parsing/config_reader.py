"""How the parser reads configs: as strict YAML, in any encoding, and the package's by name."""

import os
from typing import Any

import yaml
from jsonargparse import Path, set_loader  # type: ignore[attr-defined]

from dia_lightning import _strict_yaml
from dia_lightning._config_files import find_config
from dia_lightning._text import read_text

MODE = "strict-yaml"

_find_other = Path.__init__
_read_other = Path.read_text


def install() -> str:
    """Register the loader with jsonargparse; return the name for ``parser_mode``."""
    set_loader(MODE, _strict_yaml.load, exceptions=(yaml.YAMLError,))
    Path.__init__ = _find  # type: ignore[method-assign,assignment]  # for files that options and other configs name
    Path.read_text = _read_text  # type: ignore[method-assign,assignment]  # it reads files in the locale's encoding
    return MODE


def _find(file: Path, path: Any, mode: str = "fr", **options: Any) -> None:
    found = str(find_config(path)) if isinstance(path, str) and "r" in mode else path
    _find_other(file, found, mode, **options)
    if found != path:
        file._relative = path  # as it was given


def _read_text(path: Path) -> str:
    return read_text(os.fspath(path)) if os.path.isfile(path) else _read_other(path)
