"""Sites found by running the network."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from dia_lightning.attention._branches import Branch, branches_in
from dia_lightning.attention._graph import Run, Value
from dia_lightning.attention._named_sites import stream_of
from dia_lightning.attention._sites import LeftOut, Site, width_and_positions
from dia_lightning.attention._walk import NoBranchError

_CAUSAL = "is in a causal network, where no token may depend on later ones, but a unit's map depends on all tokens"


def branch_sites(once: Run, twice: Run) -> tuple[list[Site], list[LeftOut]]:
    """Return the sites of the residual branches, and the additions that end none.

    Args:
        once: a forward of the network.
        twice: one with twice as many samples.
    """
    if len(once.additions) != len(twice.additions):
        raise ValueError(
            f"The network adds {len(once.additions)} times for {once.samples} samples and {len(twice.additions)} times "
            f"for {twice.samples}, so the two runs cannot be compared. Give an example with more samples."
        )
    found: dict[tuple[str, str], Site] = {}
    streams = Streams()
    causal: set[int] = set()
    left_out: dict[LeftOut, None] = {}
    pairs = zip(branches_in(once.additions), branches_in(twice.additions), strict=True)
    for (addition, branch), (_, same) in pairs:
        block = addition.call.path if isinstance(branch, NoBranchError) else branch.call.path
        try:
            if isinstance(branch, NoBranchError):
                raise branch
            if isinstance(same, NoBranchError):
                raise same
            sites = list(_sites_of_branch(branch, same, once))
        except NoBranchError as reason:
            left_out[LeftOut(block, str(reason))] = None
            continue
        for site in sites:
            if (block, site.path) not in found:
                found[block, site.path] = streams.numbered(site, branch.shortcut, addition.result)
                causal |= {found[block, site.path].lane} if branch.is_causal else set()
    for site in [site for site in found.values() if site.lane in causal]:
        left_out[LeftOut(site.block, f"{site.path!r} {_CAUSAL}")] = None
        del found[site.block, site.path]
    attending = {site.block for site in found.values() if site.branch == "attention"}
    sites = [replace(s, branch="mlp") if s.block in attending and s.branch == "conv" else s for s in found.values()]
    return sites, list(left_out)


def _sites_of_branch(branch: Branch, same: Branch, run: Run) -> Iterator[Site]:
    for summand, again in zip(branch.endings, same.endings, strict=True):
        reasons = []
        for ending, other in zip(summand, again, strict=True):
            axes: tuple[int, int] | str = "also runs in other blocks"
            if run.is_only_in(ending.path, branch.call.path):
                axes = axes_of(ending.value, other.value, run.samples)
            if isinstance(axes, str):
                reasons.append(f"{ending.path!r} {axes}")
                continue
            options = {"branch": branch.kind, "before": ending.before, "stream": branch.stream}
            yield site_at(ending.path, branch.call.path, ending.value, axes, **options)
            break
        else:
            raise NoBranchError(reasons[0])


class Streams:
    """Distinguishes streams of features passed from block to block, as in two towers or a decoder."""

    def __init__(self) -> None:
        self.count = 0
        self.last: dict[tuple[int, int], tuple[Site, list[Value]]] = {}  # by size: with the sums of the site's block

    def numbered(self, site: Site, given: Value, result: Value) -> Site:
        """Return a site with the number of its stream.

        Args:
            site: a site that runs after those before.
            given: what its block made of the stream.
            result: the stream after it.
        """
        before, sums = self.last.get(width_and_positions(site), (None, []))
        if before is None or not (before.block == site.block or _is_made_of(given, sums)):
            self.count += 1
            number = self.count
        else:
            number = before.lane
        site = replace(site, lane=number)
        others = sums if before is not None and before.block == site.block else []
        self.last[width_and_positions(site)] = site, [*others, result]
        return site


#: An autoencoder's latent has at least this many times fewer entries than the features before and after it.
_LATENT = 8


def _is_made_of(value: Value, others: list[Value]) -> bool:
    """Return whether a value derives from one of some others without passing a latent of far fewer entries."""
    first = min(other.number for other in others)
    size = min(value.numel, *(other.numel for other in others))
    seen, waiting = {value}, [value]
    while waiting:
        current = waiting.pop()
        if current in others:
            return True
        wide = [parent for parent in current.parents if parent.number >= first and _LATENT * parent.numel > size]
        new = [parent for parent in wide if parent not in seen]
        seen.update(new)
        waiting.extend(new)
    return False


def axes_of(value: Value, with_more: Value, samples: int) -> tuple[int, int] | str:
    """Return the axes of channels and samples, or the reason why they are unknown.

    Args:
        value: features.
        with_more: the same features in a run with more samples.
        samples: number of samples of the first run.
    """
    if value.channel_axis is None:
        return "loses the axis of the channels"
    if len(value.shape) != len(with_more.shape):
        return "has a different number of axes with more samples"
    grown = [axis for axis, sizes in enumerate(zip(value.shape, with_more.shape, strict=True)) if sizes[0] != sizes[1]]
    if len(grown) != 1:
        return "has no axis of samples"
    if value.shape[grown[0]] != samples:
        return "folds the samples into an axis of windows, patches or frames"
    return value.channel_axis, grown[0]


def measured(model: nn.Module, blocks: dict[str, str], once: Run, twice: Run) -> dict[str, Site]:
    """Return the sites at layers, in the order in which they run, with the axes of their outputs.

    Args:
        model: the network.
        blocks: path of a layer -> path of its block.
        once: a forward of the network.
        twice: one with twice as many samples.

    Raises:
        ValueError: if a layer does not run, or its axes are not known.
    """
    values = [{call.path: call.returned for call in reversed(run.calls)} for run in (once, twice)]
    streams = Streams()
    sites = {}
    for path in dict.fromkeys(call.path for call in once.calls if call.path in blocks):
        value, more = (run[path] for run in values)
        if value is None or more is None:
            raise ValueError(f"sites: {path!r} does not return a tensor first. Name a layer that does.")
        axes = axes_of(value, more, once.samples)
        if isinstance(axes, str):
            raise ValueError(f"sites: {path!r} {axes}. Name another layer.")
        site = site_at(path, blocks[path], value, axes, stream=stream_of(model.get_submodule(blocks[path])))
        sites[path] = streams.numbered(site, value, value)
    unused = [path for path in blocks if path not in sites]
    if unused:
        raise ValueError(f"sites: {unused[0]!r} does not run when the network is called with the example.")
    return sites


def site_at(path: str, block: str, value: Value, axes: tuple[int, int], **options: Any) -> Site:
    """Return the site at a layer with its axes."""
    channel, batch = axes
    from_end = channel - len(value.shape)
    axis = -1 if from_end == -1 and channel != 1 else channel
    return Site(path, block, value.shape[channel], axis, batch, shape=value.shape, **options)
