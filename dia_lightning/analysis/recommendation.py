"""Which layers could share one attention unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dia_lightning.analysis.correlation import StageCorrelation
from dia_lightning.attention import attention_layers


@dataclass(frozen=True)
class Recommendation:
    """Which layers could share one unit.

    Args:
        threshold: the minimum correlation between two layers of a group.
        groups: per stage, groups of layer numbers within the stage; every layer is in one group.
        plug: for :func:`~dia_lightning.attention.attach` with ``share="stage"``: attention in the blocks of the largest
            group of each stage, and none in its other blocks. ``None`` if no two layers agree that well, or those that
            do fill no whole block; to ``attach``, ``None`` means attention in every block.
    """

    threshold: float
    groups: list[list[list[int]]]
    plug: str | None


def recommend(network: nn.Module, stages: Sequence[StageCorrelation], *, threshold: float = 0.8) -> Recommendation:
    """Group consecutive layers of a stage whose maps agree pairwise, and return how to attach one unit to them.

    Layers are visited in the order in which they run; one joins the group before it if its correlation with every layer
    of the group is at least the threshold. Correlated maps do not prove that one unit works as well: train both.

    Args:
        network: the recorded network, with attention in every block.
        stages: of :func:`map_correlation`.
        threshold: in (0, 1].

    Raises:
        ValueError: if the threshold is out of range, or the stages are not those of the network.

    Source:
        This package's own.

    Example:
        >>> import torch
        >>> from dia_lightning.analysis import MapRecorder, map_correlation
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=20, block="basic"), "se", share="block").eval()
        >>> with MapRecorder(network) as recorder, torch.no_grad():
        ...     _ = network(torch.randn(8, 3, 32, 32))
        >>> len(recommend(network, map_correlation(recorder.stages)).groups)
        3
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}.")
    blocks = {layer.path: layer.block for layer in attention_layers(network)}
    unknown = [path for stage in stages for path in stage.layers if path not in blocks]
    if unknown or sum(len(stage.layers) for stage in stages) != len(blocks):
        raise ValueError("The correlations are not those of this network. Record its own maps.")
    groups = [_groups(stage.matrix, threshold) for stage in stages]
    plug = "|".join(_mask(stage.layers, found, blocks) for stage, found in zip(stages, groups, strict=True))
    return Recommendation(threshold, groups, plug if "1" in plug else None)


def _mask(layers: Sequence[str], groups: list[list[int]], blocks: Mapping[str, str]) -> str:
    """Return a digit per block of a stage: 1 for those of the group that fills most blocks."""
    sites: dict[str, list[str]] = {}
    for path in layers:
        sites.setdefault(blocks[path], []).append(path)
    masks = []
    for group in groups:
        chosen = {layers[number] for number in group if len(group) > 1}
        # a block of several sites is plugged if all of them are chosen
        masks.append("".join(str(int(chosen.issuperset(paths))) for paths in sites.values()))
    return max(masks, key=lambda mask: mask.count("1"))


def _groups(matrix: Tensor, threshold: float) -> list[list[int]]:
    groups: list[list[int]] = [[0]]
    for layer in range(1, len(matrix)):
        if bool((matrix[layer, groups[-1]] >= threshold).all()):  # false for NaN
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups
