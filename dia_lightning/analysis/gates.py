"""Which values the attention maps of each layer take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dia_lightning.analysis._moments import BINS
from dia_lightning.analysis.recorder import RecordedStage

#: A gate is closed below this share of its bound, and open above one minus this share.
SATURATED = 0.01
_LOW, _HIGH = 0.01, 0.99  # quantiles of the effective range


@dataclass(frozen=True)
class StageGates:
    """Statistics of the maps of the layers of a stage, over images; N is the number of channels.

    Args:
        stage: number of the stage.
        layers: names of the sites.
        bound: upper bound of the maps: 1, or more with an identity start.
        mean: ``[L, N]``.
        deviation: standard deviation over images, ``[L, N]``; 0 for maps that do not depend on the image.
        lowest: ``[L, N]``.
        highest: ``[L, N]``.
        closed: share of values below 1 % of the bound, ``[L]``.
        open: share of values above 99 % of the bound, ``[L]``.
        low: 1 % quantile of the values, ``[L]``; exact to 1/200 of the bound.
        high: 99 % quantile of the values, ``[L]``; the effective range of a layer is ``low`` to ``high``.
    """

    stage: int
    layers: list[str]
    bound: float
    mean: Tensor
    deviation: Tensor
    lowest: Tensor
    highest: Tensor
    closed: Tensor
    open: Tensor
    low: Tensor
    high: Tensor


def gate_statistics(stages: list[RecordedStage]) -> list[StageGates]:
    """Return statistics of the maps, stage by stage.

    Shares and quantiles are counted between 0 and the bound. Values outside (DIA-LSTM with ``activation`` ``"tanh"`` or
    ``"relu"``) are counted at the ends of that range, while mean, deviation, lowest and highest are exact for any unit.

    Args:
        stages: of a :class:`MapRecorder`.

    Raises:
        ValueError: if it recorded states, which have no bound.

    Source:
        This package's own.
    """
    if any(stage.content != "maps" for stage in stages):
        raise ValueError('These are states, but gates are maps. Record with MapRecorder(network, content="maps").')
    return [_of_stage(stage) for stage in stages]


def _of_stage(recorded: RecordedStage) -> StageGates:
    moments, images = recorded.moments, recorded.moments.images[0]
    mean = moments.sums[0] / images
    variance = moments.squares / images - mean.square()
    # ignore what rounding leaves
    deviation = torch.where(variance > 1e-12 * mean.square(), variance, 0.0).sqrt()
    edge = round(SATURATED * BINS)
    total = moments.counts.sum(1)
    lowest, highest = moments.lowest.amin(1), moments.highest.amax(1)
    low, high = ((_quantile(moments.counts, share) * recorded.bound).clamp(lowest, highest) for share in (_LOW, _HIGH))
    return StageGates(
        recorded.stage,
        recorded.layers,
        recorded.bound,
        mean,
        deviation,
        moments.lowest,
        moments.highest,
        moments.counts[:, :edge].sum(1) / total,
        moments.counts[:, -edge:].sum(1) / total,
        low,
        high,
    )


def _quantile(counts: Tensor, share: float) -> Tensor:
    """Return the quantile of the counted values ``[L, BINS]``, in [0, 1], taken as spread evenly within a bin."""
    wanted = share * counts.sum(1, keepdim=True)
    below = counts.cumsum(1)
    bins = (below >= wanted).double().argmax(1, keepdim=True)
    inside = counts.gather(1, bins)
    part = (wanted - (below.gather(1, bins) - inside)) / inside
    return ((bins + part) / BINS).squeeze(1)
