"""Lists and annotations of VOC that were written on other systems."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from dia_lightning.datamodules import VOCDetectionDataModule
from tests.datamodules.tiny_data import samples_of, warnings_of
from tests.datamodules.tiny_detection import voc_object, write_voc, write_voc_xml

_TINY: dict[str, Any] = {"batch_size": 1, "num_workers": 0, "pin_memory": False}


def _nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


def _voc(root: Path, **options: Any) -> VOCDetectionDataModule:
    return VOCDetectionDataModule(root=root, augment="none", **_TINY, **options)


def _write_list(folder: Path, lines: str, encoding: str = "utf-8") -> None:
    (folder / "ImageSets" / "Main" / "train.txt").write_bytes(lines.encode(encoding))


@pytest.mark.parametrize(
    ("lines", "encoding"),
    [
        ("train_0\ntrain_1\n", "utf-8-sig"),
        ("train_0  \r\n\r\ntrain_1 -1\r\n", "utf-16"),
        ("# images\nTRAIN_0\ntrain_1.jpg 1", "utf-8"),
    ],
)
def test_lists_of_other_systems_are_read(tmp_path: Path, lines: str, encoding: str) -> None:
    folder = write_voc(tmp_path)
    _write_list(folder, lines, encoding)
    data = _voc(tmp_path)
    assert warnings_of(data) == []
    assert [Path(data._samples["train"].name(i)).name for i in (0, 1)] == ["train_0.jpg", "train_1.jpg"]


@pytest.mark.parametrize("stem", ["leaf (1)", "leaf 1", "Blätter", "a.b"])
@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".png"])
def test_names_with_blanks_umlauts_and_other_endings_are_found(tmp_path: Path, stem: str, ending: str) -> None:
    folder = write_voc(tmp_path)
    (folder / "JPEGImages" / "train_2.jpg").rename(folder / "JPEGImages" / _nfd(f"{stem}{ending}"))
    (folder / "Annotations" / "train_2.xml").rename(folder / "Annotations" / f"{stem}.XML")
    _write_list(folder, f"{stem}\n{stem}\ntrain_1")
    data = _voc(tmp_path)
    [told] = warnings_of(data)
    assert "3 names for 2 images" in told
    assert [len(target["boxes"]) for _, target in samples_of(data.train_dataloader())] == [1, 1]


@pytest.mark.parametrize("text", ["True", " 1 ", "yes", "1.0"])
def test_difficult_objects_are_known_in_every_spelling(tmp_path: Path, text: str) -> None:
    folder = write_voc(tmp_path)
    easy = voc_object("dog", (20, 1, 9, 9))
    hard = easy.replace("<difficult>0", f"<difficult>{text}")
    for name in ("train_0", "val_0"):
        write_voc_xml(folder / "Annotations" / f"{name}.xml", f"<object/>{hard}{easy}")
    data = _voc(tmp_path)
    assert all("1 <object> without content" in told for told in warnings_of(data))
    assert len(samples_of(data.train_dataloader())[0][1]["boxes"]) == 1
    assert samples_of(data.val_dataloader())[0][1]["iscrowd"].tolist() == [1, 0]
    write_voc_xml(folder / "Annotations" / "train_0.xml", easy.replace("<difficult>0", "<difficult>maybe"))
    with pytest.raises(ValueError, match=r"train_0\.xml: object 1 has difficult 'maybe', expected 0 or 1"):
        _voc(tmp_path).setup("fit")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "iso-8859-1", "gbk", "cp1252"])
def test_annotations_of_every_encoding_are_read(tmp_path: Path, encoding: str) -> None:
    folder = write_voc(tmp_path)
    name = "苹果" if encoding == "gbk" else "Äpfel"
    path = folder / "Annotations" / "train_0.xml"
    write_voc_xml(path, voc_object(name, (1, 1, 9, 9)))
    declared = encoding.replace("-sig", "")
    path.write_bytes(f'<?xml version="1.0" encoding="{declared}"?>{path.read_text()}'.encode(encoding))
    data = _voc(tmp_path, classes=["cat", "dog", "person", _nfd(name)])
    data.setup("fit")
    assert samples_of(data.train_dataloader())[0][1]["labels"].tolist() == [4]
