"""The table that printing stages gives."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which prints itself with this
    from dia_lightning.attention._sites import LeftOut, Site, Stages

_HEADER = ("stage", "blocks", "sites", "channels", "positions")
_NETWORK = "(the network)"


def listing(stages: "Stages", columns: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
    """Return a table of stages, and below it what is left out.

    A stage has a line per kind of site: equal layers of its blocks are one line with the first and the last of them.

    Args:
        stages: the stages.
        columns: further columns: the header, and a text per stage.
    """
    from dia_lightning.attention._sites import in_layers  # which prints itself with this

    rows = [(*_HEADER, *(header for header, _ in columns), "branch", "layers")]
    for number, stage in enumerate(stages):
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
    lines = _aligned(rows) if stages else ["no residual branches"]
    return "\n".join([*lines, *_left_out(stages.left_out)])


def reasons(left_out: Iterable["LeftOut"]) -> list[tuple[str, list[str]]]:
    """Return each reason with the blocks that it is given for; numbers in paths do not make another reason."""
    grouped: dict[str, list[LeftOut]] = {}
    for other in left_out:
        grouped.setdefault(_numberless(other.reason), []).append(other)
    return [
        (reason if len({other.reason for other in group}) > 1 else group[0].reason, [other.block for other in group])
        for reason, group in grouped.items()
    ]


def span(paths: Sequence[str]) -> str:
    """Return one or two paths, or the first and the last of more."""
    paths = [path or _NETWORK for path in dict.fromkeys(paths)]
    return ", ".join(paths) if len(paths) < 3 else f"{paths[0]} ... {paths[-1]}"


def _left_out(left_out: Iterable["LeftOut"]) -> list[str]:
    grouped = reasons(left_out)
    width = max((len(str(len(blocks))) for _, blocks in grouped), default=0)
    lines = [f"  {len(blocks):>{width}}  {span(blocks)}\n  {'':{width}}  {reason}" for reason, blocks in grouped]
    return ["", "left out:", *lines] if lines else []


def _alike(stage: Sequence["Site"]) -> list[list["Site"]]:
    groups: dict[tuple[str, str, bool], list[Site]] = {}
    for site in stage:
        groups.setdefault((re.sub(r"\d+", "*", site.path), site.branch, site.before), []).append(site)
    return list(groups.values())


def _layers(sites: Sequence["Site"]) -> str:
    return span([site.path for site in sites]) + (" (the input)" if sites[0].before else "")


def _numberless(reason: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=[.'])|(?<=')\d+(?=\.)", "*", reason)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align all columns to the right but for the last two, which are words."""
    *numbers, branches, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join(
            [*(cell.rjust(width) for cell, width in zip(row, numbers, strict=False)), row[-2].ljust(branches), row[-1]]
        )
        for row in rows
    ]
