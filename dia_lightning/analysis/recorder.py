"""Record the attention maps of a network over many images."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dia_lightning._choices import check_choice
from dia_lightning.analysis._moments import StageMoments
from dia_lightning.attention import AttentionLayer, AttentionUnit
from dia_lightning.attention.watching import watched_layers, watching

Content: TypeAlias = Literal["maps", "states"]


@dataclass(frozen=True)
class RecordedStage:
    """The layers of a stage, and sums over their maps or states.

    Args:
        stage: number of the stage, from 0.
        layers: names of the sites, in the order in which they run.
        moments: the sums.
        bound: upper bound of the maps: 1, or more with an identity start.
        kept: maps of the first images ``[K, L, N]``, float32.
        content: what was recorded.
    """

    stage: int
    layers: list[str]
    moments: StageMoments
    bound: float
    kept: Tensor
    content: Content = "maps"


class MapRecorder(AbstractContextManager["MapRecorder"]):
    """Sums over the attention maps of every forward within the context, for correlations and statistics.

    Works with any unit, shared per stage or one per block, and with any code that runs the network. Outputs do not
    change, and memory does not grow with the number of images. A map is a vector of N values per image: the mean per
    channel if it varies over positions, or the positions if it is the same for all channels.

    Args:
        network: a network that :func:`~dia_lightning.attention.attach` was applied to, or one with its own attention
            modules, such as a pretrained EfficientNet.
        replicates: number of bootstrap replicates for the intervals; 0 for none.
        keep: number of images, from the first, whose maps are kept themselves; :func:`map_importance` needs them.
        seed: of the bootstrap.
        content: ``"maps"``, or ``"states"``: what a unit hands to the next layer, as one vector per image; for a
            DIA-LSTM, the hidden and cell states of all cells, concatenated.
        own: whether to record the network's own modules; by default if no attention is attached.
        example: an input of the network, for those; as for :func:`~dia_lightning.attention.attach`.

    Raises:
        ValueError: if no attention is attached, a number is negative, or a unit whose states are to be recorded has
            none.

    Example:
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=20, block="basic"), "se", share="block").eval()
        >>> with MapRecorder(network) as recorder, torch.no_grad():
        ...     for _ in range(3):
        ...         _ = network(torch.randn(8, 3, 32, 32))
        >>> recorder.images, [stage.layers[0] for stage in recorder.stages]
        (24, ['layer1.0.bn2', 'layer2.0.bn2', 'layer3.0.bn2'])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        replicates: int = 200,
        keep: int = 0,
        seed: int = 0,
        content: Content = "maps",
        own: bool | None = None,
        example: Any = None,
    ) -> None:
        check_choice("content", content, get_args(Content))
        for name, value in (("replicates", replicates), ("keep", keep), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}.")
        self.network = network
        self.replicates = replicates
        self.keep = keep
        self.content = content
        self._watched = watched_layers(network, own, example)  # the network is not inspected again
        self.layers = [layer for layer, _ in self._watched]
        self._random = np.random.default_rng(seed)
        self._bound = _bound(network)
        self._members = _members(self.layers)
        self._moments: dict[int, StageMoments] = {}
        self._kept: dict[int, list[Tensor]] = {}
        self._arrived: dict[int, Tensor] = {}
        self._weights: Tensor | None = None
        self._weighted: set[int] = set()  # stages that have seen the images of these weights
        self._counted: Tensor | None = None
        self._awaited: set[int] | None = None  # stages still to be recorded; None records all of them, always
        self._watch: AbstractContextManager[Any] | None = None

    @property
    def images(self) -> int:
        """Number of recorded images."""
        return 0 if not self._moments else int(next(iter(self._moments.values())).images[0])

    @property
    def stages(self) -> list[RecordedStage]:
        """The records, stage by stage.

        Raises:
            ValueError: if there was no forward within the context.
        """
        if not self._moments:
            raise ValueError("Nothing was recorded. Run the network within the context of the recorder.")
        return [
            RecordedStage(
                stage,
                [self.layers[number].path for number in self._members[stage]],
                moments,
                self._bound,
                torch.cat(self._kept[stage]),
                self.content,
            )
            for stage, moments in sorted(self._moments.items())
        ]

    def only_next(self, counted: Tensor | None) -> None:
        """Record only the next forward, until this is called again.

        Args:
            counted: which of its images count ``[B]``; ``None`` for all. Padding in distributed runs must not. Forwards
                with a different number of images are skipped.
        """
        self._counted = None if counted is None else counted.cpu()
        self._awaited = set(self._members)

    def __enter__(self) -> "MapRecorder":
        self._watch = watching(self._watched, self._see)
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._watch is not None
        self._watch.__exit__(kind, error, trace)
        self._arrived = {}

    def _see(self, layer: int, attention_map: Tensor, state: Any) -> None:
        stage = self.layers[layer].stage
        members = self._members[stage]
        if layer == members[0]:  # a new forward: drop what an aborted one left
            for number in members:
                self._arrived.pop(number, None)
            if self._weights is None or stage in self._weighted or self._weights.shape[1] != len(attention_map):
                self._weights = self._new_weights(len(attention_map))
                self._weighted = set()
            self._weighted.add(stage)
        is_map = self.content == "maps"
        self._arrived[layer] = _as_vectors(attention_map.detach()) if is_map else self._state_vectors(layer, state)
        if layer == members[-1] and all(number in self._arrived for number in members):
            self._add(stage, torch.stack([self._arrived.pop(number) for number in members], 1))

    def _add(self, stage: int, maps: Tensor) -> None:
        assert self._weights is not None
        maps, weights = maps.cpu(), self._weights
        if self._awaited is not None:
            if stage not in self._awaited or (self._counted is not None and len(self._counted) != len(maps)):
                return
            self._awaited.remove(stage)
        if self._counted is not None:
            maps, weights = maps[self._counted], weights[:, self._counted]
        if stage not in self._moments:
            self._moments[stage] = StageMoments(maps.shape[1], maps.shape[2], replicates=self.replicates)
            self._kept[stage] = [maps[:0].float()]
        if len(maps) == 0:  # the batch is all padding
            return
        missing = self.keep - sum(map(len, self._kept[stage]))
        if missing > 0:
            self._kept[stage].append(maps[:missing].float())
        self._moments[stage].add(maps, weights, bound=self._bound)

    def _state_vectors(self, layer: int, state: Any) -> Tensor:
        parts = [part.detach().flatten(1) for part in tree_leaves(state) if isinstance(part, Tensor)]
        if not parts:
            raise ValueError(
                f"The attention of {self.layers[layer].path} hands no state to the next layer, so there is none to "
                'record. Record its maps: content="maps".'
            )
        return torch.cat(parts, 1)  # [B, N]

    def _new_weights(self, batch: int) -> Tensor:
        drawn = torch.from_numpy(self._random.poisson(1.0, (self.replicates, batch)))
        return torch.cat([torch.ones(1, batch, dtype=drawn.dtype), drawn])


def _as_vectors(attention_map: Tensor) -> Tensor:
    """Return a map ``[B, C or 1, H or 1, W or 1]`` as ``[B, N]``."""
    channels = attention_map.shape[1]
    return attention_map.flatten(1) if channels == 1 else attention_map.flatten(2).mean(2)


def _members(layers: list[AttentionLayer]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for number, layer in enumerate(layers):
        members.setdefault(layer.stage, []).append(number)
    return members


def _bound(network: nn.Module) -> float:
    """Return the factor of the identity start, or 1."""
    scales = [unit.scale for unit in network.modules() if isinstance(unit, AttentionUnit)]
    return max([1.0, *(float(scale) for scale in scales if scale is not None)])
