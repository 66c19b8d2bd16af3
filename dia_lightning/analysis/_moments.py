"""Sums over the attention maps of a stage, from which correlations and statistics follow."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

#: Number of bins that map values are counted in, from 0 to the bound of the unit (1 without identity start).
BINS = 200


class StageMoments:
    """Sums over images of the maps of L layers of one stage, in memory that does not grow with the number of images.

    Row 0 of every bootstrapped sum counts each image once. The other rows count each image a random number of times
    (Poisson with mean 1), the online form of the bootstrap.

    Args:
        layers: number of layers L.
        size: length N of a map as a vector.
        replicates: number of bootstrap replicates R.

    Source:
        Bootstrap: Oza and Russell, "Online bagging and boosting", 2001.
    """

    def __init__(self, layers: int, size: int, *, replicates: int) -> None:
        rows = 1 + replicates

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        self.images = zeros(rows)  # n
        self.correlations = zeros(rows, layers, layers)  # of each image over its channels, summed
        self.correlated = zeros(rows, layers, layers)  # images in which both maps vary
        self.sums = zeros(rows, layers, size)
        self.products = zeros(rows, layers, layers)  # summed over images and channels
        self.squares = zeros(layers, size)
        self.counts = zeros(layers, BINS)  # values per bin
        self.lowest = torch.full((layers, size), torch.inf, dtype=torch.float64)
        self.highest = torch.full((layers, size), -torch.inf, dtype=torch.float64)

    def add(self, maps: Tensor, weights: Tensor, *, bound: float) -> None:
        """Add images.

        Args:
            maps: ``[B, L, N]``.
            weights: how often each image counts ``[1 + R, B]``; the first row is 1.
            bound: upper bound of the maps; the lower one is 0.
        """
        maps = maps.double()
        weights = weights.double()
        self.images += weights.sum(1)
        products = maps @ maps.mT  # [B, L, L]
        self.products += torch.einsum("rb,blm->rlm", weights, products)
        self.sums += torch.einsum("rb,bln->rln", weights, maps)
        correlations, defined = _correlations(maps)
        self.correlations += torch.einsum("rb,blm->rlm", weights, correlations)
        self.correlated += torch.einsum("rb,blm->rlm", weights, defined.double())
        self.squares += maps.square().sum(0)
        self.lowest = torch.minimum(self.lowest, maps.amin(0))
        self.highest = torch.maximum(self.highest, maps.amax(0))
        bins = (maps / bound * BINS).long().clamp(0, BINS - 1)
        for layer in range(maps.shape[1]):
            self.counts[layer] += torch.bincount(bins[:, layer].flatten(), minlength=BINS)

    def combine(self, combined: Callable[[Tensor, Literal["sum", "min", "max"]], Tensor]) -> None:
        """Add the images of other processes, whose bootstrap used other seeds.

        Args:
            combined: returns the sum, minimum or maximum of a tensor over all processes.
        """
        for name, own in list(self.__dict__.items()):
            how: Literal["sum", "min", "max"] = "sum"
            if name in ("lowest", "highest"):
                how = "min" if name == "lowest" else "max"
            setattr(self, name, combined(own, how))


def _correlations(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return Pearson's coefficient of each pair of layers over channels, and where it is defined, ``[B, L, L]``.

    Where a map does not vary, the coefficient is undefined and returned as 0.
    """
    centred = maps - maps.mean(2, keepdim=True)
    lengths = centred.norm(dim=2, keepdim=True)  # [B, L, 1]
    # constant maps are constant only up to rounding
    varies = lengths > 1e-7 * maps.norm(dim=2, keepdim=True).clamp(min=1e-30)
    unit = torch.where(varies, centred / lengths.clamp(min=1e-300), 0.0)
    return unit @ unit.mT, varies & varies.mT
