"""Figures of what was measured."""

import math
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch
from matplotlib.figure import Figure

from dia_lightning.analysis.correlation import Protocol, StageCorrelation
from dia_lightning.analysis.gates import StageGates
from dia_lightning.analysis.gradients import GradientFlow, RelativeChange
from dia_lightning.analysis.importance import Layout, StageImportance
from dia_lightning.drawing import Curve, HeatMap, draw_curves, draw_heat_maps, draw_map_values, short_number

_PROTOCOLS: dict[Protocol, str] = {
    "per-image": "over the channels of each image",
    "pooled": "over all images and channels",
    "centred": "over all images and channels, without each channel's mean",
}
_LAYOUTS: dict[Layout, str] = {"values": "one sample per image and channel", "images": "one sample per image"}


def draw_correlation(stages: Sequence[StageCorrelation], protocol: Protocol) -> Figure:
    """Draw the correlation matrices of all stages.

    With up to 10 layers, cells show their values. Grey cells are undefined because a map does not vary.

    Args:
        stages: of :func:`map_correlation`.
        protocol: the one that was used, for the title.
    """
    return draw_heat_maps(
        [HeatMap(_correlation_title(stage), stage.matrix.numpy()) for stage in stages],
        title=f"Correlation between attention maps of layers, protocol {protocol}\n({_PROTOCOLS[protocol]})",
        label="Pearson correlation",
        axes=("layer", "layer"),
        colours="RdBu_r",
        least=-1,
    )


def _correlation_title(stage: StageCorrelation) -> str:
    low, high = stage.interval
    mean = "" if math.isnan(stage.mean) else f"\nmean {short_number(stage.mean)}"
    interval = "" if math.isnan(low) else f" [{short_number(low)}, {short_number(high)}]"
    return f"{stage_title(stage.stage, stage.layers)}{mean}{interval}"


def draw_importance(stages: Sequence[StageImportance]) -> Figure:
    """Draw how important each earlier layer is for the maps of a later one.

    Args:
        stages: of :func:`map_importance`; stages of a single layer are left out.

    Raises:
        ValueError: if no stage has more than one layer.
    """
    stages = [stage for stage in stages if len(stage.layers) > 1]
    if not stages:
        raise ValueError("No stage has more than one layer with attention, so no layer can be important to another.")
    return draw_heat_maps(
        [_importance_map(stage) for stage in stages],
        title=f"Random forests that predict a layer's maps from those before it\n({_LAYOUTS[stages[0].layout]})",
        label="importance (each row sums to 1)",
        axes=("source layer", "target layer"),
        first_row=1,
        missing="white",
    )


def _importance_map(stage: StageImportance) -> HeatMap:
    shown = stage.matrix.numpy()[1:, :-1].copy()  # the first layer has no source, and the last is not one
    shown[np.triu_indices(len(shown), 1)] = np.nan
    explained = stage.explained[~stage.explained.isnan()].tolist() or [math.nan]
    share = f"R² {short_number(min(explained))} to {short_number(max(explained))}"
    return HeatMap(f"{stage_title(stage.stage, stage.layers)}\n{share}", shown)


def draw_gates(stages: Sequence[StageGates]) -> Figure:
    """Draw the mean and effective range of each layer's maps, and the share of saturated values.

    Args:
        stages: of :func:`gate_statistics`.
    """
    mean = torch.cat([stage.mean.mean(1) for stage in stages])
    low, high, closed, opened = (
        torch.cat([getattr(stage, name) for stage in stages]).numpy() for name in ("low", "high", "closed", "open")
    )
    return draw_map_values(
        Curve(mean.numpy(), low, high, "mean", "1 % to 99 % of the values"),
        closed,
        opened,
        bound=max(stage.bound for stage in stages),
        stages=[f"stage {stage.stage}" for stage in stages for _ in stage.layers],
    )


def draw_gradients(flow: GradientFlow, without: GradientFlow | None = None) -> Figure:
    """Draw the size of the gradient at the output of each block, on a logarithmic scale.

    Args:
        flow: of :func:`gradient_flow`.
        without: the same for the same blocks within :func:`without_shortcuts`.
    """
    flows = {"mean": flow} if without is None else {"with shortcuts": flow, "without shortcuts": without}
    return draw_curves(
        [_gradient_curve(name, one) for name, one in flows.items()],
        flow.blocks,
        title="Gradient of the loss at the output of each block",
        label="|dLoss / d output|",
        logarithmic=True,
    )


def _gradient_curve(name: str, flow: GradientFlow) -> Curve:
    low, _, high = flow.quantiles.numpy()
    return Curve(flow.mean.numpy(), low, high, name, "5 % to 95 %")


def draw_relative_change(change: RelativeChange) -> Figure:
    """Draw how much each block changes its input; blocks that change its shape are left out.

    Args:
        change: of :func:`relative_change`.
    """
    mean, deviation = change.mean.numpy(), change.deviation.numpy()
    return draw_curves(
        [Curve(mean, mean - deviation, mean + deviation, "mean over images", "one standard deviation")],
        change.blocks,
        title="Relative change of the features in each block",
        label="‖output - input‖ / ‖input‖",
    )


def stage_title(stage: int, layers: Sequence[str]) -> str:
    """Return the number of a stage and the container that its sites share; for a single site, its block.

    Args:
        stage: its number.
        layers: names of the sites.

    Example:
        >>> stage_title(1, ["layer2.0.bn2", "layer2.1.bn2"])
        'stage 1 (layer2)'
        >>> stage_title(1, ["layer2.0.bn2"])
        'stage 1 (layer2.0)'
        >>> stage_title(0, ["0.end", "1.end"])
        'stage 0'
    """
    parts = zip(*(name.split(".")[:-1] for name in layers), strict=False)
    common = ".".join(same[0] for same in takewhile(lambda names: len(set(names)) == 1, parts))
    return f"stage {stage} ({common})" if common else f"stage {stage}"
