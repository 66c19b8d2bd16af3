from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from dia_lightning.datamodules import _images
from dia_lightning.datamodules._image_files import find_images
from dia_lightning.datamodules._images import load_image
from tests.datamodules.tiny_data import pixels


def _loaded(path: Path, channels: int = 3) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(load_image(path, channels=channels)).astype(np.int64)


def test_rgb_png_comes_back_as_saved(tmp_path: Path) -> None:
    image = pixels(5, 7, 3)
    Image.fromarray(image).save(tmp_path / "x.png")
    assert (_loaded(tmp_path / "x.png") == image).all()


def test_grey_file_gives_three_equal_channels(tmp_path: Path) -> None:
    image = pixels(5, 7)
    Image.fromarray(image).save(tmp_path / "x.png")
    assert (_loaded(tmp_path / "x.png") == image[..., None]).all()


def test_colour_file_gives_one_channel_where_grey_is_asked_for(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (90, 90, 90)).save(tmp_path / "x.png")
    assert _loaded(tmp_path / "x.png", channels=1).tolist() == [[90] * 4] * 4


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, kind: str, channels: int) -> None:
    values = np.arange(0, 65536, 257 * 5)
    deep = values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[kind])
    path = tmp_path / ("x.png" if kind == "I;16" else "x.tif")
    Image.frombytes(kind, (len(values), 1), deep.tobytes()).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    assert _loaded(path, channels).reshape(len(values), -1)[:, 0].tolist() == list(range(0, 256, 5))


@pytest.mark.parametrize("values", [[0.0, 0.5], [70000, 5], [-1, 5]])
def test_unknown_value_range_is_refused_by_name(tmp_path: Path, values: list[float]) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(np.array([values], dtype=np.float32 if values[1] == 0.5 else np.int32)).save(path)
    with pytest.raises(ValueError, match=r"x\.tif.*white point"):
        load_image(path)


def test_transparent_pixels_are_laid_over_the_background(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "x.png")
    assert _loaded(tmp_path / "x.png").tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert np.asarray(load_image(tmp_path / "x.png", background=0)).tolist() == [[[0, 0, 0], [10, 20, 30]]]


def test_grey_with_alpha_is_laid_over_the_background(tmp_path: Path) -> None:
    Image.frombytes("LA", (2, 1), bytes([7, 0, 7, 255])).save(tmp_path / "x.png")
    assert _loaded(tmp_path / "x.png", channels=1).tolist() == [[255, 7]]


def test_palette_gives_its_colours_and_its_transparent_entry_the_background(tmp_path: Path) -> None:
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert _loaded(tmp_path / "opaque.png").tolist() == [[[1, 2, 3], [40, 50, 60]]]
    assert _loaded(tmp_path / "clear.png").tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_one_bit_image_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "x.png")
    assert _loaded(tmp_path / "x.png", channels=1).tolist() == [[255, 0]]


def test_cmyk_jpeg_gives_the_printed_colour(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    assert np.abs(_loaded(tmp_path / "x.jpg") - [255, 0, 0]).max() <= 4


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = pixels(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    assert (_loaded(tmp_path / "x.png") == np.rot90(image, k=-1)).all()


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert _loaded(tmp_path / "x.gif")[0, 0].tolist() == [255, 0, 0]


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _nothing(content: bytes) -> bytes:
    return b""


def _html(content: bytes) -> bytes:
    return b"<html>404</html>"


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".png", _cut),
        (".jpg", _cut),
        (".bmp", _cut),
        (".webp", _cut),
        (".png", _flip_a_bit),
        (".png", _nothing),
        (".jpg", _html),
    ],
)
def test_damaged_file_is_an_error_that_names_it(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"bad{suffix}"
    Image.fromarray(pixels(40, 40, 3)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"bad\{suffix} cannot be read as an image"):
        load_image(path)


def test_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png")


def test_too_many_pixels_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (100, 60)).save(tmp_path / "x.png")
    monkeypatch.setattr(_images, "MAX_PIXELS", 6000)
    load_image(tmp_path / "x.png")
    monkeypatch.setattr(_images, "MAX_PIXELS", 5999)
    with pytest.raises(ValueError, match=r"x\.png.*100 x 60 pixels"):
        load_image(tmp_path / "x.png")


def test_pillows_own_limit_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (100, 60)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"x\.png"):
        load_image(tmp_path / "x.png")


def test_reading_is_refused_while_pillow_accepts_truncated_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "x.png")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(tmp_path / "x.png")


def test_images_of_all_folders_are_listed_in_order_without_dot_names(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.webp", ".hidden/3.png", "b/.4.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path).paths == [str(tmp_path / name) for name in ("a.webp", "b/1.jpg", "b/2.PNG")]


def test_broken_link_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"x\.png is a broken link to .*gone\.png"):
        find_images(tmp_path)
