"""Fold maps that hardly depend on the image into the weights of their layers."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dia_lightning._evaluating import evaluating
from dia_lightning.attention import is_attached
from dia_lightning.attention.folding import attached_slots, finding_obstacles, fold, keep_remembered
from dia_lightning.attention.watching import watching


@dataclass(frozen=True)
class FoldedSite:
    """A site with attention, and what happened to it.

    Args:
        path: of the site in the network.
        stage: number of its stage, from 0.
        variation: how much its map varies; NaN if the site did not run or its unit gives no map.
        kept: why the attention was kept; empty if it was folded.
    """

    path: str
    stage: int
    variation: float
    kept: str

    @property
    def is_folded(self) -> bool:
        """Whether the map is now part of the weights."""
        return not self.kept


@dataclass(frozen=True)
class FoldReport:
    """What :func:`fold_constant_maps` did.

    Args:
        sites: all sites that had attention, in the order in which they run in their stages.
        difference: largest absolute difference between the outputs before and after folding, over all batches.
        mean_difference: mean of the absolute differences.
        magnitude: mean of the absolute outputs before folding, for comparison.
    """

    sites: list[FoldedSite]
    difference: float
    mean_difference: float
    magnitude: float

    @property
    def folded(self) -> list[FoldedSite]:
        """The sites whose attention was folded."""
        return [site for site in self.sites if site.is_folded]


def fold_constant_maps(
    network: nn.Module,
    batches: Iterable[Any],
    tolerance: float,
    *,
    run: Callable[[Any], Any] | None = None,
) -> FoldReport:
    """Replace attention maps that hardly depend on the image with their mean, in place, for deployment.

    The variation of a site is the largest standard deviation of any channel of its map over images (and positions, if
    the map has them), divided by the mean of the map over channels. Where it does not exceed the tolerance, the mean
    map is multiplied into weight and bias of the norm, convolution or linear layer at the site, and the attention there
    is removed. A norm that :func:`~dia_lightning.attention.attach` added after the layer is folded into it too, and
    the layer gets a bias for it. A network with no attention left is the plain one.

    A unit without memory can be folded at any site. One with memory, such as DIA-LSTM, hands a state from block to
    block, so it is folded only at the last sites of a chain, back to the last one that varies: no later map needs their
    state. Other sites keep their attention: those whose layer cannot absorb a factor per channel (this is tested), such
    as a norm that includes an activation, and those of the network's own modules.

    Args:
        network: with attention, not compiled. Maps are those of evaluation mode; the modes are restored.
        batches: representative data, at least two images, iterated twice: a list, or a loader that does not shuffle;
            not an iterator.
        tolerance: in [0, 1); 0 folds only maps that are exactly the same for all images.
        run: runs the network on a batch; by default the network is called with the batch, or its first item. Tensors in
            what it returns are compared before and after.

    Returns:
        What happened to each site, and how much the outputs changed.

    Raises:
        ValueError: if the tolerance is outside [0, 1), ``batches`` is an iterator or has fewer than two images, no
            attention is attached, or the network is compiled.

    Source:
        After arXiv 2304.06345 (Huang, Zhong et al., ECCV 2024), which observes that channel attention approaches
        constant vectors in training, and trains a vector instead of the module's input, so that its map is constant by
        construction. Folding the maps of an ordinary unit after training, the measure of variation and the treatment of
        memory are this package's own, and an approximation unless the variation is 0.

    Example:
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=20, block="basic"), "se", identity=True)
        >>> report = fold_constant_maps(network, [torch.randn(8, 3, 32, 32)], tolerance=0.01)
        >>> len(report.folded), report.difference < 1e-5
        (9, True)
    """
    _check(network, batches, tolerance)
    run = run or (lambda batch: network(batch[0] if isinstance(batch, tuple | list) else batch))
    watched = attached_slots(network)
    moments = [_Moments() for _ in watched]

    def see(number: int, attention_map: Tensor, state: Any) -> None:
        moments[number].add(attention_map, state)

    with evaluating(network):
        with watching(watched, see), finding_obstacles(network) as obstacles:
            before = [_outputs(run, batch) for batch in batches]
        if max((each.images for each in moments), default=0) < 2:
            raise ValueError(
                "batches must have at least two images, to measure how maps vary between images. Give a few hundred."
            )
        of_slot = {slot: each for (_, slot), each in zip(watched, moments, strict=True)}
        for slot, each in of_slot.items():
            if not obstacles[slot] and not each.variation <= tolerance:
                obstacles[slot] = f"its map varies by more than {tolerance:g}"
        keep_remembered(network, {slot for slot, each in of_slot.items() if each.has_memory}, obstacles)
        fold(network, {slot: of_slot[slot].map(slot.channels) for slot in of_slot if not obstacles[slot]})
        after = [_outputs(run, batch) for batch in batches]
    sites = [FoldedSite(layer.path, layer.stage, of_slot[slot].variation, obstacles[slot]) for layer, slot in watched]
    return FoldReport(sites, *_differences(before, after))


class _Moments:
    """Sums over the maps of a site, per channel."""

    def __init__(self) -> None:
        self.images = 0
        self.has_memory = False
        self._count = 0
        self._first = self._sums = self._squares = torch.zeros(1, dtype=torch.float64)  # [C]

    def add(self, attention_map: Tensor, state: Any) -> None:
        """Add the map ``[B, C or 1, ...]`` of a batch."""
        self.images += len(attention_map)
        self.has_memory = self.has_memory or any(isinstance(leaf, Tensor) for leaf in tree_leaves(state))
        values = attention_map.detach().double().cpu().transpose(0, 1).flatten(1)  # [C, B x positions]
        if self._count == 0:
            self._first = values[:, 0]
        values = values - self._first[:, None]  # exactly 0 if the map is always the same
        self._count += values.shape[1]
        self._sums = self._sums + values.sum(1)
        self._squares = self._squares + values.square().sum(1)

    @property
    def variation(self) -> float:
        """Largest deviation of a channel, divided by the mean of the map; NaN if there was no map."""
        if self._count == 0:
            return math.nan
        deviation = (self._squares / self._count - (self._sums / self._count).square()).clamp_min(0).sqrt().max()
        level = (self._first + self._sums / self._count).abs().mean()
        return 0.0 if deviation == 0 else float(deviation / level)

    def map(self, channels: int) -> Tensor:
        """Return the mean map ``[C]``."""
        return (self._first + self._sums / self._count).expand(channels)


def _check(network: nn.Module, batches: Iterable[Any], tolerance: float) -> None:
    if not 0 <= tolerance < 1:  # also refuses NaN
        raise ValueError(
            f"tolerance must be in [0, 1), the deviation of a map relative to its mean, such as 0.01; got {tolerance}."
        )
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches is a {type(batches).__name__}, which is exhausted after one pass, but two are needed. Give a "
            "list or a loader."
        )
    if not is_attached(network):
        raise ValueError("No attention is attached to this network, so there is nothing to fold.")
    if any(module._compiled_call_impl is not None for module in network.modules()):
        raise ValueError("The network is compiled and would keep running its attention. Fold before compile().")


def _outputs(run: Callable[[Any], Any], batch: Any) -> list[Tensor]:
    leaves = tree_leaves(run(batch))
    return [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _differences(before: list[list[Tensor]], after: list[list[Tensor]]) -> tuple[float, float, float]:
    """Return the largest and the mean absolute difference, and the mean absolute output before."""
    pairs = [pair for one, other in zip(before, after, strict=True) for pair in zip(one, other, strict=True)]
    count = max(1, sum(one.numel() for one, _ in pairs))
    differences = [(one.double() - other.double()).abs() for one, other in pairs if one.numel()]
    largest = max((float(difference.max()) for difference in differences), default=0.0)
    total = sum(float(difference.sum()) for difference in differences)
    return largest, total / count, sum(float(one.double().abs().sum()) for one, _ in pairs) / count
