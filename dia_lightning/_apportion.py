"""Integer shares of groups."""

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


def apportion(sizes: Counts, count: int) -> Counts:
    """Return how many of ``count`` each group gets in proportion to its size; the largest remainders are rounded up."""
    shares = sizes * (count / sizes.sum())
    counts: Counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: count - counts.sum()]] += 1
    return counts
