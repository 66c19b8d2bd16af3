"""Data that are there are used, or it is said: files, classes and bits that would go unnoticed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from dia_lightning.datamodules import DigitsDataModule, ImageFolderDataModule, SampleError
from dia_lightning.datamodules._formats import FORMATS, readable_formats
from dia_lightning.datamodules._image_files import find_images
from dia_lightning.datamodules._images import image_size, load_image
from tests.datamodules.tiny_data import pixels, samples_of, warnings_of, write_image_folder
from tests.datamodules.tiny_detection import coco_data, write_coco


def _data(root: Path, **options: Any) -> ImageFolderDataModule:
    settings: dict[str, Any] = {"image_size": 16, "batch_size": 2, "num_workers": 0, "pin_memory": False, **options}
    return ImageFolderDataModule(root=str(root), **settings)


# Files


def test_files_of_every_ending_that_pillow_reads_are_used(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    formats = [name for name in readable_formats() if name in Image.SAVE and name != "SUN"]
    endings = [ending for name in formats for ending in FORMATS[name]]
    assert {".jfif", ".jpe", ".tif", ".bmp", ".gif", ".pbm", ".jp2", ".tga", ".webp"} <= set(endings)
    assert features.check("avif") == (".avif" in endings)
    for name in formats:
        for ending in FORMATS[name]:
            Image.new("RGB", (20, 20), (9, 8, 7)).save(tmp_path / "train" / "ant" / f"x{ending.upper()}", format=name)
    data = _data(tmp_path)
    assert warnings_of(data) == []
    samples = samples_of(data.train_dataloader())
    assert len(samples) == 12 + len(endings)


def test_documents_are_never_opened_whatever_they_are_called(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match=r"x\.png cannot be read as an image"):
            read(tmp_path / "x.png")


def test_files_that_are_no_images_are_counted_but_notes_and_hidden_files_are_not(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    assert warnings_of(_data(tmp_path)) == []
    for name in ("notes.txt", "Thumbs.db", ".DS_Store", "README", "__MACOSX/._0.png", "@eaDir/0.png/thumb.jpg"):
        (tmp_path / "train" / "bee" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "bee" / name).touch()
    (tmp_path / "train" / "__MACOSX").mkdir()
    assert warnings_of(_data(tmp_path)) == []
    for name in ("a.psd", "b.PSD", "c.eps", "4f2a"):
        (tmp_path / "train" / "bee" / name).touch()
    [told] = warnings_of(_data(tmp_path))
    assert f"4 file(s) in {tmp_path / 'train'} are no images" in told
    assert "2 .psd, 1 .eps, 1 without ending" in told
    told_of_folder = warnings_of(_data(tmp_path, predict_folder=tmp_path / "train" / "bee"), "predict")
    assert ["2 .psd, 1 .eps, 1 without ending" in text for text in told_of_folder] == [True]


def test_images_beside_the_class_folders_are_counted(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "train" / "x.png")
    [told] = warnings_of(_data(tmp_path))
    assert "1 image(s)" in told
    assert "no class folder" in told
    assert "x.png" in told


def test_folder_that_links_to_one_above_is_walked_once(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()  # a folder, whatever its name
    Image.new("L", (4, 4)).save(tmp_path / "x.png" / "a.png")
    (tmp_path / "x.png" / "again").symlink_to(tmp_path)
    assert find_images(tmp_path).paths == [str(tmp_path / "x.png" / "a.png")]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_file_that_is_trained_and_validated_on_is_named(tmp_path: Path, link: Any) -> None:
    write_image_folder(tmp_path)
    link(tmp_path / "train" / "ant" / "0.png", tmp_path / "val" / "bee" / "twin.png")
    [told] = warnings_of(_data(tmp_path))
    assert "1 of 13 images of the validation part are training images, too" in told
    assert "twin.png" in told


def test_several_frames_are_told_of_but_a_thumbnail_is_none(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train", "val"), classes=("ant",))
    page = Image.new("L", (30, 30))
    page.save(tmp_path / "train" / "ant" / "a.tif", save_all=True, append_images=[page.resize((8, 8))])
    assert warnings_of(_data(tmp_path)) == []
    page.save(tmp_path / "train" / "ant" / "b.tif", save_all=True, append_images=[page])
    [told] = warnings_of(_data(tmp_path))
    assert "1 of 6 files" in told
    assert "b.tif: only the first of each is used" in told


# Classes


def test_no_class_goes_into_validation_as_a_whole(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("train",))
    for number in (1, 2, 3):
        (tmp_path / "train" / "cat" / f"{number}.png").unlink()
    data = _data(tmp_path, val_split=6, split_seed=3)
    assert warnings_of(data) == []
    assert {label for _, label in samples_of(data.train_dataloader())} == {0, 1, 2}
    assert len(samples_of(data.val_dataloader())) == 6
    [told] = warnings_of(_data(tmp_path, val_split=7, drop_last=False))
    assert "Class(es) cat of the validation part have no training sample" in told


# Bits


def _write_deep(root: Path, most: int, dtype: Any = np.uint16) -> None:
    for split in ("train", "val"):
        (root / split / "cell").mkdir(parents=True)
        for number in range(3):
            values = np.random.default_rng(number).integers(0, most + 1, (16, 16)).astype(dtype)
            Image.fromarray(values).save(root / split / "cell" / f"{number}.tif")


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_unused_bits_are_told_of_and_the_option_makes_use_of_the_others(tmp_path: Path, bits: int) -> None:
    _write_deep(tmp_path, 2**bits - 1)
    told = warnings_of(_data(tmp_path))
    assert len(told) == 2  # both splits
    assert f"uses more than {bits} (up to {2**bits - 1})" in told[0]
    assert f"Set bit_depth={bits}" in told[0]
    data = _data(tmp_path, bit_depth=bits, resize_size=16)
    assert warnings_of(data) == []
    image = data.denormalize(samples_of(data.val_dataloader())[0][0])
    with Image.open(tmp_path / "val" / "cell" / "0.tif") as file:
        expected = np.asarray(file).astype(np.float64) / (2**bits - 1)
    torch.testing.assert_close(image[0].double(), torch.from_numpy(expected), atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize(("most", "dtype"), [(65535, np.uint16), (255, np.uint8)])
def test_nothing_is_said_of_images_that_use_their_bits(tmp_path: Path, most: int, dtype: Any) -> None:
    _write_deep(tmp_path, most, dtype)
    assert warnings_of(_data(tmp_path)) == []


def test_bit_depth_goes_for_boxes_and_folders_too_and_does_not_change_8_bits(tmp_path: Path) -> None:
    write_coco(tmp_path)
    plain, deep = coco_data(tmp_path), coco_data(tmp_path, bit_depth=12)
    for data in (plain, deep):
        data.setup("validate")
    assert torch.equal(samples_of(plain.val_dataloader())[0][0], samples_of(deep.val_dataloader())[0][0])
    Image.fromarray(np.full((50, 60), 4095, dtype=np.uint16)).save(tmp_path / "images" / "val_0.png")
    assert samples_of(deep.val_dataloader())[0][0].unique().tolist() == [1.0]
    folder = coco_data(tmp_path, bit_depth=12, predict_folder=str(tmp_path / "images" / "val_0.png"))
    folder.setup("predict")
    assert samples_of(folder.predict_dataloader())[0][0].unique().tolist() == [1.0]


def test_pixel_above_the_bit_depth_is_an_error_with_both(tmp_path: Path) -> None:
    _write_deep(tmp_path, 5000)
    data = _data(tmp_path, bit_depth=10)
    data.setup("fit")
    with pytest.raises(SampleError, match=r"brightest pixel is \d+, but bit_depth=10 ends at 1023"):
        samples_of(data.val_dataloader())
    for value in (0, 17, 8.5, None):
        with pytest.raises(ValueError, match=r"bit_depth must be a whole number from 1 to 16, got"):
            _data(tmp_path, bit_depth=value)


# Without classes, and single files


@pytest.mark.parametrize("place", ["", "train"])
def test_images_without_class_folders_are_one_class(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    for number in range(6):
        Image.fromarray(pixels(20, 20, 3, seed=number)).save(tmp_path / place / f"{number}.png")
    data = _data(tmp_path, val_split=2, pixel_range="symmetric")
    assert warnings_of(data) == []
    assert data.class_names == ["images"]
    assert [len(samples_of(loader)) for loader in (data.train_dataloader(), data.val_dataloader())] == [4, 2]
    again = _data(tmp_path, val_split=2)
    again.load_state_dict(data.state_dict())
    again.setup("fit")
    photos = _data(tmp_path, predict_folder=tmp_path)
    photos.trained_classes = ["ant", "bee"]
    photos.setup("predict")
    assert photos.class_names == ["ant", "bee"] or place == "train"


def test_class_folders_beside_loose_images_in_root_are_told_of(tmp_path: Path) -> None:
    write_image_folder(tmp_path, splits=("cats",), classes=("a",))
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    Image.new("L", (8, 8)).save(tmp_path / "y.png")
    [told] = warnings_of(_data(tmp_path, val_split=1, batch_size=1))
    assert "4 image(s)" in told
    assert "folders beside the others" in told


def test_one_image_or_a_list_of_them_is_predicted_in_order(tmp_path: Path) -> None:
    names = ["b.png", "a.png", "no_ending", "more/c.png"]
    (tmp_path / "more").mkdir()
    for number, name in enumerate(names):
        Image.fromarray(pixels(8, 8, seed=number)).save(tmp_path / name, format="PNG")
    paths = [str(tmp_path / name) for name in names]
    for given, expected in ((paths[0], paths[:1]), ([*paths[:3], str(tmp_path / "more")], paths)):
        data = DigitsDataModule(predict_folder=given, num_workers=0, pin_memory=False)
        data.setup("predict")
        assert [data.sample_name(index) for index in range(len(samples_of(data.predict_dataloader())))] == expected
        assert data.hparams["predict_folder"] == given
    with pytest.raises(FileNotFoundError, match=r"gone\.png is neither a folder nor an image"):
        DigitsDataModule(predict_folder=[*paths, "gone.png"]).setup("predict")
