import numpy as np
import pytest
import torch

from dia_lightning.drawing import draw_table
from dia_lightning.drawing._image_table import TEXT
from dia_lightning.drawing._letters import font


def test_pixels_become_squares_of_one_colour() -> None:
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    image = torch.stack([red, blue], 1)[:, None].repeat(1, 2, 1)  # left red, right blue
    picture = np.asarray(draw_table([[image]], "title"))
    for colour in ((255, 0, 0), (0, 0, 255)):
        rows, columns = np.nonzero((picture == colour).all(2))
        assert np.ptp(rows) + 1 == 48
        assert np.ptp(columns) + 1 == 24
        assert len(rows) == 48 * 24


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (20, 100), (64, 64)])
def test_images_are_enlarged_by_a_whole_number_and_never_cut(channels: int, size: tuple[int, int]) -> None:
    image = torch.zeros(channels, *size)
    picture = np.asarray(draw_table([[image] * 3, [image]], "A title that is wider than the table itself"))
    black = (picture[48:] == 0).all(2)  # below the title
    scale = max(1, -(-48 // min(size)))
    assert black.sum() == 4 * scale**2 * size[0] * size[1]


def test_headings_are_not_wider_than_their_columns() -> None:
    image = torch.zeros(1, 8, 8)
    narrow, wide = (
        draw_table([[image] * 10], "", headings=["M" * length] * 10, names=["W" * 14]) for length in (1, 14)
    )
    assert wide.width > 10 * font(TEXT).getlength("M" * 14) > narrow.width
