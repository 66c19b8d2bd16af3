"""What is written on pictures."""

from typing import Any

import pytest
from PIL import ImageDraw

Written = list[tuple[str, tuple[float, ...]]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """Every text that is written on a picture, and the pixels it covers: left, top, right, bottom."""
    found: Written = []
    original = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: Any, words: str, **options: Any) -> None:
        found.append((words, self.textbbox(place, words, font=options["font"], anchor=options["anchor"])))
        original(self, place, words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found
