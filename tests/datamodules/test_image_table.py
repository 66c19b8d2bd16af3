"""Images that a CSV file lists."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dia_lightning.datamodules import ImageTableDataModule
from dia_lightning.tasks import ClassificationTask
from tests.datamodules.tiny_data import pixels, warnings_of
from tests.tasks.conftest import small_trainer

LABELS = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]] * 5)
OPTIONS: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_workers": 0, "augment": "none"}


def write(root: Path, name: str, header: str, rows: list[str]) -> None:
    (root / "images").mkdir(exist_ok=True)
    for i in range(len(rows)):
        Image.fromarray(pixels(9, 9, 3, seed=i)).save(root / "images" / f"{i}.png")
    lines = [header, *(f"images/{i}.png,{row}" for i, row in enumerate(rows))]
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def several(root: Path, name: str = "train.csv") -> None:
    write(root, name, "file,sun,sea,ship", [",".join(map(str, row)) for row in LABELS])


def test_several_columns_are_labels_in_every_split(tmp_path: Path) -> None:
    several(tmp_path)
    several(tmp_path, "test.csv")
    data = ImageTableDataModule(root=tmp_path, val_split=8, **OPTIONS)
    assert data.class_names == ["sun", "sea", "ship"]
    assert warnings_of(data) == []
    assert data._dataset("val").classes() == {0, 1, 2}
    assert any("12 of 20 images of the test part are training images" in told for told in warnings_of(data, "test"))
    images, labels, index = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert labels.dtype == torch.float32
    assert torch.equal(labels, torch.from_numpy(LABELS[index]).float())
    train, val = data._dataset("train").labels, data._dataset("val").labels
    assert (len(train), len(val)) == (12, 8)
    assert val.sum(0).tolist() == [6, 2, 2]  # each kind of image two times
    assert data.sample_name(3) == str(tmp_path / "images" / "3.png")


def test_labels_that_no_image_of_training_has_are_told(tmp_path: Path) -> None:
    several(tmp_path, "val.csv")
    write(tmp_path, "train.csv", "file,sun,sea,ship", [",".join(map(str, row)) for row in LABELS * [1, 1, 0]])
    with pytest.warns(UserWarning, match=r"Class\(es\) ship of the validation part have no training sample"):
        ImageTableDataModule(root=tmp_path, val_split=0, **OPTIONS).setup("fit")


def test_a_multilabel_task_trains_on_them(tmp_path: Path) -> None:
    several(tmp_path)
    data = ImageTableDataModule(root=tmp_path, val_split=8, mixup=0.2, **OPTIONS)
    options: dict[str, Any] = {"backbone_args": {"depth": 11}, "class_weights": "balanced"}
    task, trainer = ClassificationTask("cifar_resnet", 3, task="multilabel", **options), small_trainer(tmp_path)
    trainer.fit(task, data)
    assert task._loss_weight is not None
    assert task._loss_weight.tolist() == pytest.approx([3 / 9, 9 / 3, 9 / 3])
    assert {"val/map", "val/f1", "val/acc"} <= set(trainer.callback_metrics)
    with pytest.raises(ValueError, match="For several labels per image set task='multilabel'"):
        small_trainer(tmp_path).fit(ClassificationTask("cifar_resnet", 3, backbone_args={"depth": 11}), data)
    data = ImageTableDataModule(root=tmp_path, val_split=8, sampling="balanced", **OPTIONS)
    with pytest.raises(ValueError, match="sampling='balanced' needs one class per image"):
        data.train_dataloader()


def test_one_column_is_the_class_by_name(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "file,class", ["sea", "sun", "sea", "ship"])
    write(tmp_path, "val.csv", "file,class", ["ship", "sea"])
    data = ImageTableDataModule(root=tmp_path, **OPTIONS)
    assert data.class_names == ["sea", "ship", "sun"]
    assert next(iter(data.val_dataloader()))[1].tolist() == [1, 0]
    write(tmp_path, "val.csv", "file,class", ["boat"])
    with pytest.raises(ValueError, match=r"val.csv has class\(es\) that training did not have: boat"):
        ImageTableDataModule(root=tmp_path, **OPTIONS).val_dataloader()


def test_tables_of_other_systems_are_read(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "file,class", ["A\u0308", "b"])  # in two characters, as a Mac writes
    (tmp_path / "val.csv").write_text("file;class\r\nIMAGES\\1.PNG;b\r\nimages\\0.png;\u00c4\r\n", encoding="utf-16")
    data = ImageTableDataModule(root=tmp_path, drop_last=False, **OPTIONS)
    with pytest.warns(UserWarning, match="2 of 2 images of the validation part are training images"):
        data.setup("fit")
    assert next(iter(data.val_dataloader()))[1].tolist() == data._dataset("train").labels[::-1].tolist()
    write(tmp_path, "test.csv", "file,a,b", ["1.0,0.0", "0.0,1.0"])
    (tmp_path / "test.csv").rename(tmp_path / "train.csv")
    assert ImageTableDataModule(root=tmp_path, **OPTIONS)._dataset("train").labels.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("labels", ["sea", "1,0"])
def test_images_of_12_bits_are_scaled(tmp_path: Path, labels: str) -> None:
    write(tmp_path, "train.csv", "file,a" if labels == "sea" else "file,a,b", [labels])
    Image.fromarray(np.full((8, 8), 4095, dtype=np.uint16)).save(tmp_path / "images" / "0.png")
    source = ImageTableDataModule(root=tmp_path, bit_depth=12, **OPTIONS).load_split("train")
    assert source is not None
    assert source.image(0).getextrema() == ((255, 255),) * 3


def test_what_is_doubtful_in_a_table_is_told(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "file,class", ["sea", "Sea"])
    with open(tmp_path / "train.csv", "a") as file:
        file.write("./images/0.png,Sea\n")
    data = ImageTableDataModule(root=tmp_path, **OPTIONS)
    different = pytest.warns(UserWarning, match=r"lists 1 image\(s\) with different labels in several lines")
    with pytest.warns(UserWarning, match=r"classes \['Sea', 'sea'\], which differ in letter case"), different:
        data.load_split("train")


def test_labels_that_no_training_image_has_are_told(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "file,a,b,c", ["1,0,0", "1,0,1"] * 2)
    write(tmp_path, "val.csv", "file,a,b,c", ["0,1,1"])
    with pytest.warns(UserWarning, match=r"Class\(es\) b of the validation part have no training sample"):
        ImageTableDataModule(root=tmp_path, **OPTIONS).setup("fit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.png", r"must begin with the names of different columns, file,label .*begins with 'file'"),
        ("file,a,a\na.png,0,1", "names of different columns"),
        ("file,a,b\n", r"has 0 more line\(s\)"),
        ("", "begins with ''"),
        ("file,a,b\na.png,1", "line 2: 2 values for 3 columns"),
        ("file,a,b\na.png,1,2", "line 2: labels of several columns must be 0 or 1, got '2'"),
        ("file,a,b\na.png,1,", "line 2: a value is empty"),
        ("file,a\n../a.png,x", r"line 2: '../a.png' is not below"),
        ("file,a\n..\\a.png,x", "line 2: .* is not below"),
        ("file;a\n\na.png;x\na.png", "line 4: 1 values for 2 columns"),
        ("file,a\nb.png,x", r"line 2: there is no file .*b\.png"),
    ],
)
def test_a_faulty_table_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ImageTableDataModule(root=tmp_path, val_split=1, **OPTIONS).load_split("train")


def test_tables_of_any_system_list_files_of_any_depth(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 4095, dtype=np.uint16)).save(tmp_path / "a.png")
    (tmp_path / "train.csv").write_text("file,class\r\na.png,übung\r\n", encoding="utf-16")
    data = ImageTableDataModule(root=tmp_path, bit_depth=12, val_split=0, **OPTIONS)
    source = data.load_split("train")
    assert source is not None
    assert np.asarray(source.image(0)).tolist() == [[[255] * 3] * 8] * 8
    assert data.class_names == ["übung"]


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file .*train\.csv: expected a table of images"):
        ImageTableDataModule(root=tmp_path, **OPTIONS).setup("fit")
