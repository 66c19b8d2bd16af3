"""Download data sets: archives with a checksum, from a list of URLs."""

import http.client
import os
import tarfile
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm import tqdm  # type: ignore[import-untyped]

_TIMEOUT = 30  # seconds without a byte before the next URL is tried


@dataclass(frozen=True)
class Archive:
    """An archive of a data set.

    Args:
        filename: name under which it is kept in the data folder.
        md5: checksum; a file without it is never used, so any mirror will do.
        urls: where to download it, tried in this order.
        env: environment variable with a URL to try first; one that ends with ``/`` is a folder of archives.
    """

    filename: str
    md5: str
    urls: tuple[str, ...]
    env: str

    def candidates(self) -> list[str]:
        """Return every URL to try, the user's own first."""
        own = os.environ.get(self.env)
        if not own:
            return list(self.urls)
        return [own + self.filename if own.endswith("/") else own, *self.urls]

    def missing(self, folder: Path, reason: str) -> FileNotFoundError:
        """Return the error for a missing data set: one line with all that is needed to provide it."""
        return FileNotFoundError(
            f"There is no whole, unpacked {self.filename} in {folder} ({reason}). Put a copy there (md5 {self.md5}, "
            f"from {self.urls[-1]}), or allow download=True, or set ${self.env} to a URL that has it (file:// works)."
        )


def intact(folder: Path, files: Iterable[tuple[str, str]]) -> bool:
    """Return whether all files, given as (name, md5), are in a folder and intact."""
    return all(check_integrity(folder / name, md5) for name, md5 in files)


def obtain(archive: Archive, folder: Path, *, download: bool) -> None:
    """Unpack an archive into its own folder, after downloading it if it is missing.

    Raises:
        FileNotFoundError: if it is missing and cannot or must not be downloaded.
        ValueError: if a name in it leads out of the folder.
    """
    path = folder / archive.filename
    if not check_integrity(path, archive.md5):
        if not download:
            raise archive.missing(folder, "download=False")
        _fetch(archive, path)
    _unpack(path, folder)


def _unpack(path: Path, folder: Path) -> None:
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            try:  # otherwise names with .., and links, could write anywhere
                archive.extractall(folder, filter="data")
            except tarfile.FilterError as error:
                raise ValueError(
                    f"{path} is not unpacked, because a file in it leads out of {folder} ({error}). Delete it."
                ) from error
    else:  # Python keeps names in zip files inside the folder
        extract_archive(os.fspath(path), os.fspath(folder))


def _fetch(archive: Archive, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    failures = []
    try:
        for url in archive.candidates():
            rank_zero_info(f"Downloading {url} to {path.parent}")
            try:
                _save(url, part)
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not a URL
                failures.append(f"{url}: {error}")
                continue
            if check_integrity(part, archive.md5):
                os.replace(part, path)
                return
            failures.append(f"{url}: wrong md5")
    finally:
        part.unlink(missing_ok=True)
    raise archive.missing(path.parent, "; ".join(failures))


def _save(url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "dia-lightning"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        # disable=None: no bar where stderr is a file
        with tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            while part := response.read(1 << 20):
                file.write(part)
                bar.update(len(part))
