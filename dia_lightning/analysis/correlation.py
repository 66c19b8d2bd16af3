"""How much the attention maps of different layers agree."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from dia_lightning._choices import check_choice
from dia_lightning.analysis._moments import StageMoments
from dia_lightning.analysis.recorder import RecordedStage

Protocol: TypeAlias = Literal["per-image", "pooled", "centred"]

_LEAST, _MOST = 0.025, 0.975  # of bootstrap replicates: an interval of 95 %


@dataclass(frozen=True)
class StageCorrelation:
    """Pearson correlation between the maps of the layers of a stage.

    Args:
        stage: number of the stage.
        layers: names of the sites.
        matrix: ``[L, L]``, symmetric, in [-1, 1]; NaN where a map never varies.
        mean: over all pairs of different layers; NaN for a single layer.
        interval: 95 % interval of the mean, by bootstrap over images; NaN without replicates.
        undefined: share of images and pairs that were left out because one of the maps did not vary.
        replicates: the mean in each replicate of the bootstrap ``[R]``; NaN where undefined.
    """

    stage: int
    layers: list[str]
    matrix: Tensor
    mean: float
    interval: tuple[float, float]
    undefined: float
    replicates: Tensor


def map_correlation(stages: list[RecordedStage], protocol: Protocol = "per-image") -> list[StageCorrelation]:
    """Return the Pearson correlation between layers' maps, stage by stage.

    It is not known which protocol the paper's "up to 0.85" (arXiv 2210.16101, abstract) rests on. The first two include
    differences between channels that are the same in every image; the third does not.

    Args:
        stages: of a :class:`MapRecorder`.
        protocol: ``"per-image"``: over the channels of each image, then the mean over images. ``"pooled"``: over all
            values of all images and channels. ``"centred"``: the same after subtracting the mean over images from each
            channel of each layer.

    Raises:
        ValueError: if the protocol is unknown.

    Source:
        This package's own reading of arXiv 2210.16101, which does not state a protocol.
    """
    check_choice("protocol", protocol, get_args(Protocol))
    return [_of_stage(stage, protocol) for stage in stages]


def mean_correlation(stages: list[StageCorrelation]) -> float:
    """Return the mean over all pairs of different layers within a stage, over all stages."""
    pairs = torch.cat([_pairs(stage.matrix) for stage in stages])
    return float(pairs.nanmean())


def mean_interval(stages: list[StageCorrelation]) -> tuple[float, float]:
    """Return the 95 % interval of :func:`mean_correlation`, by bootstrap over images; NaN without replicates.

    Args:
        stages: of one recorder, whose replicates draw the same images in all stages.
    """
    counts = torch.stack([(~_pairs(stage.matrix).isnan()).sum() for stage in stages]).double()
    means = torch.stack([stage.replicates for stage in stages])[counts > 0]
    return _interval((means * counts[counts > 0, None]).sum(0) / counts.sum())


def _of_stage(recorded: RecordedStage, protocol: Protocol) -> StageCorrelation:
    moments = recorded.moments
    matrices = _per_image(moments) if protocol == "per-image" else _pooled(moments, centred=protocol == "centred")
    means = torch.stack([_pairs(matrix).nanmean() for matrix in matrices])
    undefined = 1 - float(_pairs(moments.correlated[0]).mean() / moments.images[0]) if len(matrices[0]) > 1 else 0.0
    return StageCorrelation(
        recorded.stage, recorded.layers, matrices[0], float(means[0]), _interval(means[1:]), undefined, means[1:]
    )


def _interval(replicates: Tensor) -> tuple[float, float]:
    replicates = replicates[~replicates.isnan()]
    if len(replicates) == 0:
        return float("nan"), float("nan")
    low, high = replicates.quantile(torch.tensor([_LEAST, _MOST], dtype=replicates.dtype)).tolist()
    return low, high


def _per_image(moments: StageMoments) -> Tensor:
    return (moments.correlations / moments.correlated).clamp(-1, 1)  # 0 / 0 where a map never varies


def _pooled(moments: StageMoments, *, centred: bool) -> Tensor:
    images, size = moments.images[:, None, None], moments.sums.shape[2]
    if centred:
        covariance = moments.products - moments.sums @ moments.sums.mT / images
    else:
        totals = moments.sums.sum(2, keepdim=True)  # [R, L, 1]
        covariance = moments.products - totals @ totals.mT / (images * size)
    variance = covariance.diagonal(dim1=1, dim2=2)  # [R, L]
    # ignore what rounding leaves
    scale = moments.products.diagonal(dim1=1, dim2=2)
    deviation = torch.where(variance > 1e-12 * scale, variance, torch.nan).sqrt()
    return (covariance / (deviation[:, :, None] * deviation[:, None, :])).clamp(-1, 1)


def _pairs(matrix: Tensor) -> Tensor:
    above = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    return matrix[above]
