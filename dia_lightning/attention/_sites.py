"""What a site is, and which sites form a stage."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, cast

from torch import Tensor, nn

#: ``"conv"``: the only branch of a convolutional block; ``"attention"`` and ``"mlp"``: those of a transformer block.
Branch = Literal["conv", "attention", "mlp"]


@dataclass(frozen=True)
class Site:
    """A layer that ends a residual branch.

    Args:
        path: of the layer in the network.
        block: path of the module whose forward adds the branch to the shortcut; empty for the network itself.
        channels: number of channels C there.
        channel_axis: axis of the channels: 1, -1 if they come last, or any other.
        batch_axis: axis of the samples.
        branch: what the branch does.
        before: whether the layer's input ends the branch instead of its output.
        stream: name of the block's argument that is the shortcut; ``None`` if unknown.
        shape: of the features in the example; ``None`` if the network was not run.
        lane: number of the stream of features passed between the blocks; different streams never share a unit.
    """

    path: str
    block: str
    channels: int
    channel_axis: int = 1
    batch_axis: int = 0
    branch: Branch = "conv"
    before: bool = False
    stream: str | None = None
    shape: tuple[int, ...] | None = None
    lane: int = field(default=0, repr=False)

    @property
    def resolution(self) -> tuple[int, ...]:
        """Sizes of the axes of positions in the example, such as (56, 56), or (197,) tokens."""
        shape = self.shape or ()
        others = {self.batch_axis, self.channel_axis % max(1, len(shape))}
        return tuple(size for axis, size in enumerate(shape) if axis not in others)

    def __str__(self) -> str:
        return f"{self.path} ({self.branch}, {self.channels} channels)"


@dataclass(frozen=True)
class LeftOut:
    """An addition that attention is not attached to.

    Args:
        block: path of the module whose forward adds.
        reason: why.
    """

    block: str
    reason: str


def in_stages(sites: Iterable[Site], size: Callable[[Site], Any]) -> list[list[Site]]:
    """Group the sites of consecutive blocks that have a site of the same size.

    Args:
        sites: in the order in which they run.
        size: what the sites of a stage have in common.
    """
    stages: list[list[Site]] = []
    open_stages: dict[Any, list[Site]] = {}
    for _, block in groupby(sites, key=lambda site: site.block):
        reached: dict[Any, list[Site]] = {}
        for site in block:
            stage = reached.get(size(site)) or open_stages.get(size(site))
            if stage is None or _is_nested(stage[-1].block, site.block):
                stage = []
                stages.append(stage)
            stage.append(site)
            reached[size(site)] = stage
        open_stages = reached
    return stages


def in_layers(sites: Sequence[Site]) -> list[list[Site]]:
    """Group sites by their block or, in a block that runs several layers itself, by its layers."""
    grouped: dict[tuple[str, str | None], list[Site]] = {}
    for site in sites:
        number = numbered_around(site.path, [other.path for other in sites if other.block == site.block])
        inside = number is not None and len(number) > len(site.block)
        grouped.setdefault((site.block, number if inside else None), []).append(site)
    return list(grouped.values())


def width_and_positions(site: Site) -> tuple[int, int]:
    """Return the width and the number of positions of a site in a network that was run."""
    return site.channels, math.prod(site.resolution)


def size_and_lane(site: Site) -> tuple[int, int, int]:
    """Return what the sites of a stage have in common in a network that was run."""
    return *width_and_positions(site), site.lane


def _is_nested(block: str, other: str) -> bool:
    """Return whether one of two blocks is inside the other, and would still be running when a state leaves it."""
    return block != other and (
        f"{block}.".startswith(f"{other}.".lstrip(".")) or f"{other}.".startswith(f"{block}.".lstrip("."))
    )


def width(module: nn.Module, path: str) -> int:
    """Return the number of output channels of a module.

    Raises:
        ValueError: if no attribute states it.
    """
    channels = channels_of(module)
    if channels is None:
        raise ValueError(
            f"The width of {type(module).__name__} is unknown ({path}): it has no num_features, out_channels, "
            "out_features, normalized_shape or embed_dim. Give an `example`, or name the last layer in it, or the one "
            "before it, as the site."
        )
    return channels


def channels_of(module: nn.Module) -> int | None:
    """Return the number of output channels of a module, if an attribute states it."""
    for name in ("num_features", "out_channels", "out_features", "normalized_shape", "embed_dim"):
        value = getattr(module, name, None)
        if isinstance(value, tuple) and value:
            value = value[-1]
        if isinstance(value, int):
            return value
    if type(module).__name__ == "FrozenBatchNorm2d":  # of torchvision, not imported here
        return len(cast(Tensor, module.weight))
    return None


def possible_sites(model: nn.Module) -> str:
    """List the paths of the layers whose number of channels is known."""
    paths = [path for path, module in model.named_modules() if path and channels_of(module) is not None]
    return ", ".join(paths[:20] or ["none"]) + (f" and {len(paths) - 20} more" if len(paths) > 20 else "")


def numbered_around(path: str, others: Sequence[str]) -> str | None:
    """Return the start of a path up to the innermost number that distinguishes it from other paths, if any."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdigit() and any(
            len(other := site.split(".")) == len(parts)
            and other[: end - 1] == parts[: end - 1]
            and other[end - 1] != parts[end - 1]
            and other[end:] == parts[end:]
            for site in others
        ):
            return ".".join(parts[:end])
    return None
