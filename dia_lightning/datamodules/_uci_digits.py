"""The handwritten digits that come with scikit-learn, and their split into training and test."""

from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

from dia_lightning.datamodules._sampling import stratified_split

_TEST_SAMPLES = 250
_TEST_SEED = 42  # fixed, unlike split_seed: the test set is the same in every run


def read_digits(part: Literal["train", "test"]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return 1,547 digits for training or 250 for testing.

    Returns:
        Grey images ``[N, 8, 8]``, ink is 255, and the digits ``[N]``.
    """
    digits = load_digits()
    train, test = stratified_split(digits.target, _TEST_SAMPLES, _TEST_SEED)
    chosen = test if part == "test" else train
    grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 0..16 in the data set
    return grey, digits.target[chosen]
