"""Files that are no plain picture, whatever they are called: data modules refuse them by name, and run nothing."""

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dia_lightning.datamodules import ImageFolderDataModule
from tests.datamodules.test_enclosure import KINDS


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24)).save(file, kind, **options)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header says that it is as large as that."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))))
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


FPX = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)  # an OLE document, as FPX and MIC are
BAD: dict[str, bytes] = {
    "eps": saved("EPS"),
    "eps_script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch ran) (w) file\nshowpage\n%%EOF\n",
    "pdf": saved("PDF"),
    "wmf": b"\xd7\xcd\xc6\x9a\x00\x00" + struct.pack("<hhhhH", 0, 0, 99, 99, 96) + bytes(30),
    "emf": b"\x01\x00\x00\x00" + bytes(36) + b" EMF" + bytes(60),
    "fpx": FPX,
    "psd": b"8BPS\0\x01" + bytes(40),
    "ico": saved("ICO"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "html": b"<!doctype html><html>not found</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "empty": b"",
    "zeros": bytes(4096),
    "cut": saved("PNG")[:-30],
    "cut_jpeg": saved("JPEG")[:-400],
    "wide": png_of(30_000, 30_000),
    "over": png_of(50_000_001, 1),
    "none": png_of(0, 10),
    "bomb_gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02L\x01\x00;",
    "bomb_ppm": b"P6 60000 60000 255\n",
}


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError(f"a program was started: {args}")

    for owner, name in ((subprocess, "Popen"), (os, "system")):
        monkeypatch.setattr(owner, name, refuse)


def read_all(data: Any, *parts: str) -> None:
    for part in parts or ("train", "val"):
        samples = data._dataset(part)
        for position in range(len(samples)):
            samples[position]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("kind", ["coco", "voc", "table", "folder"])
def test_every_data_module_names_a_file_that_is_no_picture(kind: str, tmp_path: Path) -> None:
    write, load, folder, name = KINDS["table" if kind == "folder" else kind]
    write(tmp_path / "data")
    file = tmp_path / "data" / folder / name
    if kind == "folder":
        (tmp_path / "data" / "train").mkdir()
        (tmp_path / "data" / "images").rename(tmp_path / "data" / "train" / "a")
        file = tmp_path / "data" / "train" / "a" / name
        load = lambda root: ImageFolderDataModule(root=root, image_size=8, batch_size=2, val_split=4, num_workers=0)  # noqa: E731
    for what, content in BAD.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read as an image") as raised:
            read_all(load(tmp_path / "data"))
        assert "\n" not in str(raised.value), what


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("kind", ["coco", "table"])
def test_images_to_predict_are_looked_at_as_closely(kind: str, tmp_path: Path) -> None:
    write, load, _, _ = KINDS[kind]
    write(tmp_path / "data")
    (tmp_path / "new").mkdir()
    for what, content in BAD.items():
        (tmp_path / "new" / "x.png").write_bytes(content)
        data = load(tmp_path / "data")
        data.predict_folder = tmp_path / "new"
        with pytest.raises(ValueError, match=r"x\.png cannot be read as an image") as raised:
            read_all(data, "predict")
        assert "\n" not in str(raised.value), what
