"""An archive writes into its folder and nowhere else."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from dia_lightning.datamodules._download import Archive, obtain


def member(name: str, *, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
    info.size = 0 if link else 3
    return info


@pytest.mark.parametrize("bad", [member("../evil.txt"), member("a/../../evil.txt"), member("link", link="../..")])
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "a.tar.gz"
    for members, is_bad in (([member("good.txt")], False), ([bad], True)):
        with tarfile.open(path, "w:gz") as archive:
            for info in members:
                archive.addfile(info, io.BytesIO(b"abc"))
        known = Archive("a.tar.gz", hashlib.md5(path.read_bytes()).hexdigest(), ("http://127.0.0.1:9/",), "X")
        if is_bad:
            with pytest.raises(ValueError, match="leads out of"):
                obtain(known, folder, download=False)
        else:
            obtain(known, folder, download=False)
    assert (folder / "good.txt").read_bytes() == b"abc"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
