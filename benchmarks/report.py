"""Writes the measurements into the pages: ``python -m benchmarks.report``, from the root of the repository."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.records import ROOT
from benchmarks.tables import File

PICTURE = Path("pictures") / "performance.png"
#: By page and name of the place there: the parts to write, and the function that does.
PLACES: dict[str, dict[str, Callable[[Sequence[File]], str]]] = {
    "performance.md": {
        "time": tables.costs,
        "memory": tables.costs,
        "kernels": tables.costs,
        "graphs": tables.graphs,
        "growth": tables.growth,
        "gpu": tables.costs,
    },
    "results.md": {"evidence": tables.evidence},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write both pages and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    options = parser.parse_args(argv)
    files = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
    for page, places in PLACES.items():
        path = options.docs / page
        text = path.read_text()
        for name, write in places.items():
            found = [file for file in files if file["part"] == name and file["rows"]]
            content = write(found) if found else "Not measured yet."
            if name == "growth" and found:
                _draw(found, options.docs / PICTURE)
                content = f"![Time of a training step, relative to plain]({PICTURE.as_posix()})\n\n{content}"
            text = _placed(text, name, content, path)
        path.write_text(text)


def _placed(text: str, name: str, content: str, page: Path) -> str:
    begin, end = f"<!-- benchmarks: {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no place for {name!r}: put the lines {begin} and {end} where it belongs.")
    return pattern.sub(lambda _: f"{begin}\n\n{content}\n\n{end}", text)


def _draw(files: Sequence[File], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row["axis"] for file in files for row in file["rows"]))
    figure = Figure(figsize=(3 * len(axes), 3 * len(files)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(files), len(axes), squeeze=False, sharey="row")
    for line, file in zip(grid, files, strict=True):
        for plot, axis in zip(line, axes, strict=True):
            for arm in dict.fromkeys(row["arm"] for row in file["rows"]):
                rows = [row for row in file["rows"] if (row["axis"], row["arm"]) == (axis, arm)]
                values = [row["value"] for row in rows]
                plot.plot(values, [row["ratio"] for row in rows], marker="o", label=arm)
                plot.fill_between(values, [row["low"] for row in rows], [row["high"] for row in rows], alpha=0.2)
            plot.axhline(1, color="grey", linewidth=0.8)
            plot.set_xlabel(axis)
            plot.set_xticks(sorted({row["value"] for row in file["rows"] if row["axis"] == axis}))
        line[0].set_ylabel(f"time to plain\n({file['rows'][0]['setting']}, {file['rows'][0]['mode']})")
    grid[0][0].legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
