"""The mean of a loss over an epoch, whatever the precision of the network."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """Mean of all values of an epoch, exact to float32 after any number of batches, in one process and in many.

    torchmetrics' ``MeanMetric`` follows the precision of the network, and bfloat16 has no number between 256 and 258;
    in float32 a million batches of 0.1 add up to 1 % too much. This one stays in float32 and accumulates what each
    sum rounds off, because not every device has float64. A non-finite value makes the mean NaN.

    Source:
        Neumaier, "Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen", 1974.
    """

    full_state_update = False

    total: Tensor
    rest: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "rest"):  # half precision changes the default type
            self.add_state(name, torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weight: int = 1) -> None:
        """Add values, each counting ``weight`` times, 0 or more."""
        if weight == 0:
            return
        added = values.detach().float().sum() * weight
        total = self.total + added
        swapped = self.total.abs() < added.abs()
        larger, smaller = torch.where(swapped, added, self.total), torch.where(swapped, self.total, added)
        self.rest = self.rest + ((larger - total) + smaller)
        self.total = total
        self.count = self.count + values.numel() * weight

    def compute(self) -> Tensor:
        """Return the mean, NaN if there is none."""
        return (self.total + self.rest) / self.count

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Move to the device of the network, but stay in float32."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
