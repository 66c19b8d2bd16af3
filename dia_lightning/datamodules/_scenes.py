"""Toy scenes for detection: real handwritten digits on textured canvases."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Floats = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]

_MOST_OBJECTS = 5
_SIDES = (20 / 128, 48 / 128)  # of a digit, relative to the side of the canvas
_TRIES = 30  # random places for a digit before it is dropped
_MOST_OVERLAP = 0.15  # of the smaller of two boxes
_LEAST_VISIBLE = 0.5  # of the ink of a digit
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class Scene:
    """One image and its digits.

    Args:
        pixels: RGB ``[S, S, 3]`` uint8.
        masks: visible ink of each digit ``[N, S, S]``.
        digits: 0 to 9 ``[N]``.
    """

    pixels: npt.NDArray[np.uint8]
    masks: Masks
    digits: npt.NDArray[np.int64]


class SceneSource:
    """Scenes composed on demand.

    A scene is a function of the digits, the seed, the size and its position, so it is the same in every process and
    session, regardless of earlier requests.

    Args:
        glyphs: grey 8x8 digits that scenes are made of ``[M, 8, 8]`` uint8, ink is 255.
        digits: their values ``[M]``, 0 to 9.
        count: number of scenes.
        size: height and width in pixels.
        seed: of the split; other seeds give other scenes.
        split: first part of the names.
        masks: whether targets have masks.
    """

    def __init__(
        self,
        glyphs: npt.NDArray[np.uint8],
        digits: npt.NDArray[np.int64],
        *,
        count: int,
        size: int,
        seed: int,
        split: str,
        masks: bool,
    ) -> None:
        self.labels = np.zeros(count, dtype=np.int64)
        self._glyphs = glyphs
        self._digits = digits
        self._size = size
        self._seed = seed
        self._split = split
        self._masks = masks
        self._last: tuple[int, Scene] | None = None  # image and target of a position are requested in turn

    def image(self, position: int) -> Image.Image:
        """Return one scene as RGB."""
        return Image.fromarray(self.scene(position).pixels)

    def name(self, position: int) -> str:
        """Return ``"split/position"``."""
        return f"{self._split}/{position}"

    def image_id(self, position: int) -> int:
        """Return position + 1."""
        return position + 1

    def target(self, position: int) -> dict[str, Tensor]:
        """Return the tight boxes of the visible ink, and masks if wanted."""
        scene = self.scene(position)
        target = {
            "boxes": torch.from_numpy(tight_boxes(scene.masks)),
            "labels": torch.from_numpy(scene.digits + 1),
            "iscrowd": torch.zeros(len(scene.digits), dtype=torch.int64),
            "area": torch.from_numpy(scene.masks.sum((1, 2)).astype(np.float32)),
        }
        return target | {"masks": torch.from_numpy(scene.masks.astype(np.uint8))} if self._masks else target

    def scene(self, position: int) -> Scene:
        """Compose one scene."""
        if self._last is None or self._last[0] != position:
            # NumPy's compatibility policy freezes RandomState's stream, so a scene never changes.
            random = np.random.RandomState([self._seed, position])
            self._last = position, compose(self._glyphs, self._digits, self._size, random)
        return self._last[1]


def compose(
    glyphs: npt.NDArray[np.uint8], digits: npt.NDArray[np.int64], size: int, random: np.random.RandomState
) -> Scene:
    """Draw 1 to 5 digits over a background."""
    canvas = _background(size, random)
    masks: Masks = np.zeros((0, size, size), dtype=bool)
    whole: list[int] = []  # pixels of ink of each digit before others covered it
    drawn: list[int] = []
    for _ in range(random.randint(1, _MOST_OBJECTS + 1)):
        chosen = random.randint(len(glyphs))
        opacity = _enlarge(glyphs[chosen], round(size * random.uniform(*_SIDES)))
        ink = opacity > 0.5
        window = _place(ink, masks, whole, random)
        if window is None:
            continue
        mask: Masks = np.zeros((1, size, size), dtype=bool)
        mask[0][window] = ink
        masks = np.concatenate([masks & ~mask, mask])
        whole.append(int(ink.sum()))
        drawn.append(int(digits[chosen]))
        colour = _ink_colour(canvas[window][ink].mean(0), random)
        canvas[window] += opacity[..., None] * (colour - canvas[window])
    return Scene(np.rint(canvas * 255).astype(np.uint8), masks, np.array(drawn, dtype=np.int64))


def tight_boxes(masks: Masks) -> Floats:
    """Return x1, y1, x2, y2 ``[N, 4]`` around what is set in masks ``[N, H, W]``, none of them empty."""
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    (x1, x2), (y1, y2) = _first_and_end(columns), _first_and_end(rows)
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float32)


def _first_and_end(hits: Masks) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.argmax(hits, axis=1), hits.shape[1] - np.argmax(hits[:, ::-1], axis=1)


def _place(ink: Masks, masks: Masks, whole: list[int], random: np.random.RandomState) -> tuple[slice, slice] | None:
    # Rows and columns where the digit hides little of the earlier ones; None if there is no such place.
    size, side = masks.shape[1], len(ink)
    box, boxes = tight_boxes(ink[None])[0], tight_boxes(masks)
    before, needed = masks.sum((1, 2)), _LEAST_VISIBLE * np.array(whole)
    for _ in range(_TRIES):
        x, y = random.randint(0, size - side + 1, size=2)
        if _overlap(box + np.array([x, y, x, y], dtype=np.float32), boxes).max(initial=0) > _MOST_OVERLAP:
            continue
        window = slice(y, y + side), slice(x, x + side)
        hidden = np.logical_and(masks[:, window[0], window[1]], ink).sum((1, 2))
        if (before - hidden >= needed).all():
            return window
    return None


def _overlap(box: Floats, others: Floats) -> Floats:
    # The overlap of two boxes relative to the smaller one.
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (box, others)]
    shared: Floats = sides.clip(0).prod(1) / np.minimum(*areas)
    return shared


def _enlarge(glyph: npt.NDArray[np.uint8], side: int) -> Floats:
    # Bicubic and steeper: a stroke with soft edges instead of a blur.
    grey = np.asarray(Image.fromarray(glyph).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    opacity: Floats = np.clip(grey / 255 * 2.6 - 0.75, 0, 1)
    return opacity


def _background(size: int, random: np.random.RandomState) -> Floats:
    # Blotches of a random scale between two colours, finer ones of less contrast, a gradient and a little grain.
    base = random.uniform(0.15, 0.85)
    colours = np.clip(base + random.uniform(-0.2, 0.2, size=(2, 3)), 0, 1).astype(np.float32)
    cells = random.randint(2, 13)
    blend = 0.7 * _blotches(cells, size, random) + 0.3 * _blotches(cells * 4, size, random)
    angle, strength = random.uniform(0, 2 * np.pi), random.uniform(0, 0.2)
    ramp = np.linspace(-0.5, 0.5, size)
    light = strength * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    grain = random.normal(0, random.uniform(0, 0.03), size=(size, size))
    shade = (light + grain).astype(np.float32)
    canvas = colours[0] + blend[..., None] * (colours[1] - colours[0])
    canvas += shade[..., None]
    clipped: Floats = canvas.clip(0, 1)
    return clipped


def _blotches(cells: int, size: int, random: np.random.RandomState) -> Floats:
    coarse = Image.fromarray(random.uniform(0, 1, size=(cells, cells)).astype(np.float32))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    blotches: Floats = smooth.clip(0, 1)
    return blotches


def _ink_colour(behind: Floats, random: np.random.RandomState) -> Floats:
    # Any hue, and a brightness that differs enough from what is behind the digit.
    brightness = float(behind @ _LUMA)
    contrast = random.uniform(0.35, 0.6)
    target = brightness - contrast if brightness > 0.5 else brightness + contrast
    hue = random.uniform(-0.5, 0.5, size=3)
    return np.clip(target + 0.6 * (hue - hue @ _LUMA), 0, 1).astype(np.float32)
