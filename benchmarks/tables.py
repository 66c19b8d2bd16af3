"""Markdown tables of the measurements."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.arms import PLAIN, SE_PER_BLOCK, SE_SHARED
from benchmarks.evidence import PROTOCOLS
from benchmarks.records import Row
from dia_lightning.reproduce.comparison import Estimate, estimate

File = dict[str, Any]


def costs(files: Sequence[File]) -> str:
    """Return a table for every network, mode and setting, with arms as rows and measurements as columns."""
    return "\n\n".join(_cost_tables(file) for file in files)


def _cost_tables(file: File) -> str:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in file["rows"]:
        groups.setdefault((row["workload"], f"batch {row['batch']}", row["setting"], row["mode"]), []).append(row)
    tables = [f"**{', '.join(group)}**\n\n{_cost_table(rows)}" for group, rows in groups.items()]
    return "\n\n".join([*tables, machine(file)])


def _cost_table(rows: list[Row]) -> str:
    arms: dict[tuple[str, str], Row] = {}
    for row in rows:
        arm = arms.setdefault((row["made_by"], row.get("arm", "")), {})
        arm.update({row["phase"]: row} if "phase" in row else row)
        arm.setdefault("parameters", row.get("parameters"))
        arm.setdefault("sites", row["sites"])
    cells = []
    for (made_by, name), arm in arms.items():
        if "left_out" in arm:
            cells.append({"of": made_by, "arm": f"{name} left out: {arm['left_out']}".strip()})
        else:
            cells.append({"of": made_by, "arm": name, **_cost_cells(arm, arms.get((made_by, PLAIN), {}))})
    return table(cells)


def _cost_cells(arm: Row, plain: Row) -> dict[str, str]:
    cells = {"parameters": f"{arm['parameters']:,}"}
    for phase in ("training", "inference"):
        if phase in arm:
            time = arm[phase]
            cells[phase] = f"{1000 * time['seconds']:.1f} ms, {time['images_per_second']:,.0f} images/s"
            cells[f"{phase}, to plain"] = f"{time['ratio']:.3f} ({time['low']:.3f} to {time['high']:.3f})"
    for key, title in (("saved_bytes", "kept for backward"), ("peak_bytes", "peak of a step")):
        if key in arm:
            more = f" ({arm[key] / plain[key]:.3f})" if key in plain else ""
            cells[title] = f"{arm[key] / 2**20:.1f} MiB{more}"
    for key in ("forward", "backward"):
        if key in arm:
            more = f" ({(arm[key] - plain[key]) / arm['sites']:+.1f} per site)" if key in plain else ""
            cells[f"kernels {key}"] = f"{arm[key]}{more}"
    return cells


def graphs(files: Sequence[File]) -> str:
    """Return into how many graphs equal blocks compile."""
    return "\n\n".join(
        f"{_pivot(file['rows'], 'blocks', lambda row: str(row['graphs']))}\n\n{machine(file)}" for file in files
    )


def growth(files: Sequence[File]) -> str:
    """Return ratios along every axis, each with the extra time per site."""
    tables = []
    for file in files:
        for axis in dict.fromkeys(row["axis"] for row in file["rows"]):
            rows = [{**row, axis: row["value"]} for row in file["rows"] if row["axis"] == axis]
            tables.append(_pivot(rows, axis, _growth_cell))
        tables.append(machine(file))
    return "\n\n".join(tables)


def _growth_cell(row: Row) -> str:
    each = 1000 * row["extra"] / row["sites"]
    return f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), {each:+.2f} ms per site"


def _pivot(rows: list[Row], axis: str, cell: Callable[[Row], str]) -> str:
    lines: dict[Any, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row[axis], {axis: str(row[axis])})[row["arm"]] = cell(row)
    return table(list(lines.values()))


def evidence(files: Sequence[File]) -> str:
    """Return accuracies and correlations of maps, over the seeds that every arm finished."""
    return "\n\n".join(_evidence(file) for file in files)


def _evidence(file: File) -> str:
    if not any("data" in row for row in file["rows"]):
        return f"Left out: {', '.join(row['left_out'] for row in file['rows'])}.\n\n{machine(file)}"
    head = next(row for row in file["rows"] if "data" in row)
    about = f"{head['data']}: {head['train_images']:,} training and {head['test_images']:,} test images, "
    accuracies: dict[str, dict[int, float]] = {}
    for row in file["rows"]:
        if "accuracy" in row:
            accuracies.setdefault(row["arm"], {})[row["seed"]] = 100 * row["accuracy"]
    seeds = sorted(set.intersection(*(set(values) for values in accuracies.values()))) if len(accuracies) == 4 else []
    if not seeds:
        return f"{about}{head['epochs']} epochs: no seed was finished by every arm.\n\n{machine(file)}"
    cells = []
    for arm, values in accuracies.items():
        own = [values[seed] for seed in seeds]
        difference = estimate([values[seed] - accuracies[PLAIN][seed] for seed in seeds]) if arm != PLAIN else None
        each = ", ".join(f"{value:.2f}" for value in own)
        cells.append({"arm": arm, "test accuracy in %": _of(estimate(own)), "to plain": _of(difference), "seeds": each})
    diverged = sum("accuracy" in row and row["loss"] is None for row in file["rows"])
    note = f" {diverged} trainings diverged." if diverged else ""
    about += f"{head['epochs']} epochs, {len(seeds)} seeds.{note}"
    return "\n\n".join([about, table(cells), _correlations(file["rows"], seeds), machine(file)])


def _correlations(rows: list[Row], seeds: list[int]) -> str:
    lines: dict[int, dict[str, str]] = {}
    for arm in (SE_PER_BLOCK, SE_SHARED):
        recorded = [row for row in rows if "epoch" in row and row["arm"] == arm and row["seed"] in seeds]
        for epoch in sorted({row["epoch"] for row in recorded}):
            line = lines.setdefault(epoch, {"epoch": str(epoch)})
            for protocol in PROTOCOLS:
                values = [row[protocol] for row in recorded if row["epoch"] == epoch]
                line[f"{arm}, {protocol}"] = _of(estimate(values), digits=3)
    return table(list(lines.values()))


def _of(value: Estimate | None, digits: int = 2) -> str:
    if value is None:
        return ""
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def machine(file: File) -> str:
    """Return the machine and the command of a file."""
    about = ", ".join(f"{key} {value}" for key, value in file["machine"].items())
    stopped = f" {file['stopped'].capitalize()}." if "stopped" in file else ""
    return f"`{file['command']}`: {about}.{stopped}"


def table(cells: Sequence[dict[str, str]]) -> str:
    """Return a table; rows may lack some columns."""
    columns = list(dict.fromkeys(column for row in cells for column in row))
    lines = [_line(columns), "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(_line(row.get(column, "") for column in columns) for row in cells)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
