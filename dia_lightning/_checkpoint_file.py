"""Checkpoints on disk: written atomically, with a digest at the end, and read only if intact."""

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO
from zipfile import ZipFile

import torch

from dia_lightning._checkpoint_kind import WrongCheckpointError, kind_of
from dia_lightning._whole_files import written_whole

# The comment of the zip file that torch writes: torch skips it, and copies of the file keep it.
_MARK = b"dia-lightning sha256 "
_SIZE = len(_MARK) + 64


class DamagedFileError(ValueError):
    """A checkpoint that cannot be read.

    Args:
        path: of the file.
        reason: in a few words.

    Attributes:
        reason: as given.
        instead: a sentence that names the newest older intact checkpoint, with a leading space; "" if there is none.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        older = newest_older(Path(path), _neighbours(Path(path)))
        self.reason = reason
        self.instead = "" if older is None else f" The newest older checkpoint that is whole is {older}."
        super().__init__(
            f"The checkpoint {os.fspath(path)} cannot be read ({reason}): it is damaged, or it holds more than "
            f"weights.{self.instead}"
        )


def load(path: str | os.PathLike[str], *, map_location: Any = "cpu", weights_only: bool = True) -> Any:
    """Read a ``torch.save`` file after verifying its digest, or else the checksums that every such file has.

    Args:
        path: of the file.
        map_location: as for ``torch.load``.
        weights_only: ``False`` would run code from the file.

    Raises:
        DamagedFileError: if the file was altered since it was written, or holds more than weights.
        FileNotFoundError: if there is none.
    """
    try:
        damage = damage_of(path)
        if damage is None:
            return torch.load(path, map_location=map_location, weights_only=weights_only)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        raise DamagedFileError(path, type(error).__name__) from error
    raise DamagedFileError(path, damage)


def read_checkpoint(
    source: str | os.PathLike[str] | IO[bytes],
    map_location: Any = None,
    *,
    hparams_file: object = None,
    weights_only: bool | None = None,
) -> tuple[dict[str, Any], str]:
    """Read a checkpoint for ``load_from_checkpoint``, which has these options from Lightning.

    Args:
        source: path or open file.
        map_location: as for ``torch.load``; without a GPU, the CPU by default.
        hparams_file: refused.
        weights_only: refused if ``False``.

    Returns:
        Its contents, and a name of the file for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds more than plain data, or an option asks for more than that.
    """
    if weights_only is False:
        raise ValueError(
            "weights_only=False would run code from the checkpoint. Omit it: checkpoints are read as data."
        )
    if hparams_file is not None:
        raise ValueError(
            f"hparams_file={str(hparams_file)!r} is not read. Pass the options themselves: "
            "load_from_checkpoint(path, NAME=...)."
        )
    place: Any = map_location if map_location is not None or torch.cuda.is_available() else "cpu"
    path = Path(source) if isinstance(source, os.PathLike) else source
    name = str(path) if isinstance(path, str | Path) else "The checkpoint"
    try:
        # explicit, because an environment variable changes the default
        if isinstance(path, str | Path):
            content = load(path, map_location=place)
        else:
            content = torch.load(path, map_location=place, weights_only=True)
    except (FileNotFoundError, DamagedFileError):
        raise
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        raise ValueError(
            f"{name} cannot be read ({type(error).__name__}): it is damaged, or it holds more than plain data."
        ) from error
    if not isinstance(content, dict):
        raise WrongCheckpointError(
            f"{name} is not the checkpoint of a training run: it holds {kind_of(content)}. Give a .ckpt written by fit."
        )
    return content, name


def save(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a ``torch.save`` file with a digest; a partial file never appears under its name.

    Raises:
        OSError: if it cannot be written; the previous file is kept.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part, open(part, "w+b") as file:
            torch.save(content, file)
            _seal(file)
    except (OSError, RuntimeError) as error:
        # torch then closes its archive, which also fails
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"The checkpoint {path} cannot be written ({cause.strerror}). {_left(Path(path))}") from error


def damage_of(path: str | os.PathLike[str]) -> str | None:
    """Return what is wrong with a file; ``None`` if nothing is, or if a torch without checksums wrote it."""
    with open(path, "rb") as file:
        start = file.read(256)
        if not start.strip(b"\0"):
            return "it is empty" if not start else "it is full of zeros"
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            return "it is an HTML page instead of the file"
        if start.startswith(b"\x80"):
            return None  # from torch before 1.6, without checksums
        if not start.startswith(b"PK\x03\x04"):
            return "it does not start like a torch file"
        try:
            with ZipFile(file) as archive:
                if archive.comment:
                    same = archive.comment == _comment(file)
                    return None if same else "its content does not match its digest"
                wrong = archive.testzip()
        except Exception as error:  # zipfile also raises anything
            return f"it was cut off, or its table of contents is wrong ({type(error).__name__})"
    return None if wrong is None else f"the content of {wrong} does not match its checksum"


def newest_older(path: Path, candidates: Iterable[Path]) -> Path | None:
    """Return the newest intact checkpoint no newer than a file; those next to it take precedence."""
    if not path.is_file():
        return None
    time = {place: place.stat().st_mtime_ns for place in {path, *candidates} if place.is_file()}
    older = [place for place in time if time[place] <= time[path] and not place.samefile(path)]
    older.sort(key=lambda place: (place.parent == path.parent, time[place], place), reverse=True)
    return next(filter(_is_whole, older), None)


def _is_whole(path: Path) -> bool:
    try:
        return damage_of(path) is None and isinstance(torch.load(path, map_location="cpu", weights_only=True), dict)
    except Exception:  # as in load
        return False


def _neighbours(path: Path) -> list[Path]:
    """Return the checkpoints next to one, and those of the runs next to its own."""
    found = list(path.parent.glob("*.ckpt"))
    return found if path.parent.name != "checkpoints" else [*found, *path.parents[2].glob("*/checkpoints/*.ckpt")]


def _left(path: Path) -> str:
    files = sorted(path.parent.glob("*.ckpt"), key=lambda place: place.lstat().st_mtime_ns)
    advice = "Make room, or give another folder."
    return f"{advice} The last one is intact: continue with --ckpt_path {files[-1]}." if files else advice


def _seal(file: BinaryIO) -> None:
    file.seek(-2, os.SEEK_END)  # of the comment's length
    file.write(struct.pack("<H", _SIZE))
    file.write(b" " * _SIZE)
    digest = _comment(file)
    file.seek(-_SIZE, os.SEEK_END)
    file.write(digest)


def _comment(file: BinaryIO) -> bytes:
    """Return the comment for the file, computed from everything before it."""
    left = file.seek(0, os.SEEK_END) - _SIZE
    digest = hashlib.sha256()
    file.seek(0)
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    return _MARK + digest.hexdigest().encode()
