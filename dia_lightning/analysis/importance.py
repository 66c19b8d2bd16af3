"""How well the attention maps of a layer can be predicted from those of the layers before it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dia_lightning._choices import check_choice
from dia_lightning.analysis.recorder import RecordedStage

Layout: TypeAlias = Literal["values", "images"]
_Array: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StageImportance:
    """Importance of the layers of a stage for the layers after them.

    Args:
        stage: number of the stage.
        layers: names of the sites.
        layout: what the rows of the regression were.
        matrix: ``[L, L]``, row t is how much a forest that predicts the maps of layer t relies on each earlier layer.
            Rows from 1 on sum to 1; those of maps that never vary, or that no split helps to predict, are NaN. All
            other entries are 0.
        explained: ``[L]``, share of the variance of layer t that its forest predicts on rows a tree did not see
            (out-of-bag R²); NaN for the first layer and for maps that never vary. If it is near 0, the row of the
            matrix means nothing. For ``"values"`` it is high if channels differ more than images do, because a tree
            has seen the same channel in other images.
    """

    stage: int
    layers: list[str]
    layout: Layout
    matrix: Tensor
    explained: Tensor


def map_importance(
    stages: list[RecordedStage],
    layout: Layout = "values",
    *,
    rows: int = 1000,
    trees: int = 30,
    seed: int = 0,
) -> list[StageImportance]:
    """Predict the maps of each layer from those of the layers before it in its stage, and measure which ones matter.

    For each layer t from 1 on, a random forest is fitted to the maps of layers 0 to t - 1. The importance of a layer is
    the share of the decrease in variance that comes from splits on it (impurity importance).

    Args:
        stages: of a :class:`MapRecorder` with ``keep``.
        layout: ``"values"``: a row is one channel of one image, with one feature per earlier layer. ``"images"``: a row
            is an image, with the channels of all earlier layers as features (importance is summed per layer) and
            the channels of the layer as targets.
        rows: maximum number of rows, chosen at random.
        trees: number of trees in a forest, at least 30; a third of them leave out any given row.
        seed: for the choice of rows and the forests.

    Returns:
        One result per stage; the matrix of a single-layer stage is 0.

    Raises:
        ValueError: if no maps were kept, the layout is unknown, or a number is too small.

    Source:
        After the figure on feature integration in arXiv 1905.10671, whose sample layout is not known; both layouts are
        this package's own interpretation.
    """
    check_choice("layout", layout, get_args(Layout))
    for name, value, least in (("rows", rows, 10), ("trees", trees, 30), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}.")
    for stage in stages:
        if len(stage.kept) < 2:
            raise ValueError(
                f"Importance needs the maps of single images, but {len(stage.kept)} were kept. "
                "Record with MapRecorder(network, keep=1000)."
            )
    return [_of_stage(stage, layout, rows, trees, seed) for stage in stages]


def _of_stage(stage: RecordedStage, layout: Layout, rows: int, trees: int, seed: int) -> StageImportance:
    random = np.random.default_rng(seed)
    maps = stage.kept.transpose(1, 2).numpy()  # [K, N, L]
    samples = maps.reshape(-1, 1, maps.shape[2]) if layout == "values" else maps  # [rows, 1 or N, L]
    samples = samples[np.sort(random.permutation(len(samples))[:rows])]
    count = len(stage.layers)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    explained = torch.full((count,), torch.nan, dtype=torch.float64)
    for target in range(1, count):
        importances, explained[target] = _fit(samples[:, :, :target], samples[:, :, target], trees, seed)
        matrix[target, :target] = torch.from_numpy(importances)
    return StageImportance(stage.stage, stage.layers, layout, matrix, explained)


def _fit(sources: _Array, target: _Array, trees: int, seed: int) -> tuple[npt.NDArray[np.float64], float]:
    """Return the importance of each source ``[t]`` and the share of the variance that is explained.

    Args:
        sources: ``[rows, features per source, t]``.
        target: ``[rows, targets]``.
        trees: of the forest.
        seed: of the forest.
    """
    from sklearn.ensemble import RandomForestRegressor  # takes seconds to import

    target = target[:, np.ptp(target, 0) > 1e-6 * np.abs(target).max(0)]  # drop constants up to rounding
    if target.shape[1] == 0:
        return np.full(sources.shape[2], np.nan), float("nan")
    wide = sources.shape[1] > 1
    forest = RandomForestRegressor(
        trees,
        min_samples_leaf=5,
        max_features="sqrt" if wide else 1.0,  # all of thousands of features would take minutes
        oob_score=True,
        random_state=seed,
    )
    forest.fit(sources.reshape(len(sources), -1), target if target.shape[1] > 1 else target[:, 0])
    importances = forest.feature_importances_.reshape(sources.shape[1:]).sum(0)
    total = importances.sum()  # 0 if no split helps
    return importances / total if total > 0 else np.full(len(importances), np.nan), float(forest.oob_score_)
