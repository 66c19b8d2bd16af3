"""Stages with their sites, and the table they print as."""

import re
from collections.abc import Iterable, Sequence

from dia_lightning.attention._sites import LeftOut, Site, in_layers

_HEADER = ("stage", "blocks", "sites", "channels", "positions")
_NETWORK = "(the network)"


class Stages(list[list[Site]]):
    """Stages, each a list of its sites in the order in which they run. They print as a table.

    Args:
        stages: the stages.
        left_out: the other additions in the network.
    """

    def __init__(self, stages: Iterable[list[Site]] = (), left_out: Iterable[LeftOut] = ()) -> None:
        super().__init__(stages)
        self.left_out = list(left_out)

    def __str__(self) -> str:
        return self.table()

    def table(self, columns: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
        """Return a table of the stages, followed by what is left out.

        A stage has a line per kind of site: equal layers of its blocks share a line, which shows the first and the
        last.

        Args:
            columns: further columns: the header, and a text per stage.

        Example:
            >>> from dia_lightning.attention import find_sites
            >>> from dia_lightning.models import get_model
            >>> stages = find_sites(get_model("cifar_resnet", depth=20, block="basic"))
            >>> print(stages.table([("first", [stage[0].block for stage in stages])]))
            stage  blocks  sites  channels  positions     first  branch  layers
                0       3      3        16    224x224  layer1.0  conv    layer1.0.bn2 ... layer1.2.bn2
                1       3      3        32    112x112  layer2.0  conv    layer2.0.bn2 ... layer2.2.bn2
                2       3      3        64      56x56  layer3.0  conv    layer3.0.bn2 ... layer3.2.bn2
        """
        rows = [(*_HEADER, *(header for header, _ in columns), "branch", "layers")]
        for number, stage in enumerate(self):
            first = stage[0]
            told = (
                str(first.channels),
                "x".join(map(str, first.resolution)) or "?",
                *(cells[number] for _, cells in columns),
            )
            for line, sites in enumerate(_alike(stage)):
                head, tail = (str(number), told) if line == 0 else ("", ("",) * len(told))
                counts = (str(len(in_layers(sites))), str(len(sites)))
                rows.append((head, *counts, *tail, sites[0].branch, _layers(sites)))
        lines = _aligned(rows) if self else ["no residual branches"]
        return "\n".join([*lines, *self._told_left_out()])

    def reasons(self) -> list[tuple[str, list[str]]]:
        """Return each reason with the blocks left out for it; reasons that differ only in path numbers count as one."""
        grouped: dict[str, list[LeftOut]] = {}
        for other in self.left_out:
            grouped.setdefault(_numberless(other.reason), []).append(other)
        return [
            (
                reason if len({other.reason for other in group}) > 1 else group[0].reason,
                [other.block for other in group],
            )
            for reason, group in grouped.items()
        ]

    def _told_left_out(self) -> list[str]:
        grouped = self.reasons()
        width = max((len(str(len(blocks))) for _, blocks in grouped), default=0)
        lines = [f"  {len(blocks):>{width}}  {_span(blocks)}\n  {'':{width}}  {reason}" for reason, blocks in grouped]
        return ["", "left out:", *lines] if lines else []


def _span(paths: Sequence[str]) -> str:
    """Return one or two paths, or the first and the last of more."""
    paths = [path or _NETWORK for path in dict.fromkeys(paths)]
    return ", ".join(paths) if len(paths) < 3 else f"{paths[0]} ... {paths[-1]}"


def _alike(stage: Sequence[Site]) -> list[list[Site]]:
    groups: dict[tuple[str, str, bool], list[Site]] = {}
    for site in stage:
        groups.setdefault((re.sub(r"\d+", "*", site.path), site.branch, site.before), []).append(site)
    return list(groups.values())


def _layers(sites: Sequence[Site]) -> str:
    return _span([site.path for site in sites]) + (" (the input)" if sites[0].before else "")


def _numberless(reason: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=[.'])|(?<=')\d+(?=\.)", "*", reason)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Right-align all columns except the last two, which are words."""
    *numbers, branches, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join(
            [*(cell.rjust(width) for cell, width in zip(row, numbers, strict=False)), row[-2].ljust(branches), row[-1]]
        )
        for row in rows
    ]
