"""The result of one run of an experiment: a small file that exists only once the run has ended."""

import csv
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from dia_lightning import __version__
from dia_lightning._redact import redact_arguments
from dia_lightning._whole_files import written_whole
from dia_lightning.reproduce.experiment import Experiment, Run

FILE = "result.json"


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
        outcome: ``"diverged"`` if the loss was no longer finite; any other error is ``"failed"``.
        metrics: the last value of everything that was logged.
        seconds: from start to end.
        command: the arguments of ``dia-lightning``, without the folder and without secrets.
        configs: digests of the contents of the base configs.
        environment: what was set for this run, for example the number of threads.
        message: last output of an unsuccessful run.
        versions: of Python, torch, Lightning and this package.
    """

    outcome: Literal["finished", "diverged", "failed"]
    metrics: dict[str, float]
    seconds: float
    command: list[str]
    configs: dict[str, str]
    environment: dict[str, str]
    message: str = ""
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    @property
    def is_final(self) -> bool:
        """Whether the run need not be repeated."""
        return self.outcome != "failed"


def write_result(result: Result, folder: Path) -> None:
    """Write the file atomically, so that a killed program leaves the whole file or none."""
    with written_whole(folder / FILE) as part:
        part.write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")


def read_result(folder: Path) -> Result | None:
    """Return the result of the run in a folder; ``None`` if it has not ended.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged. Remove the folder {folder}, and the run is repeated.") from error


def read_results(experiment: Experiment, folder: Path) -> dict[Run, Result]:
    """Return the existing results.

    Raises:
        ValueError: if a finished run was made by another command, with another content of a base config, or has not
            logged what is to be compared.
    """
    results = {}
    for run in experiment.runs:
        result = read_result(folder / run.place)
        if result is not None and result.is_final:
            _check_is_same(run, result, experiment.digests, folder)
            _check_has_metrics(run, result, experiment, folder)
        if result is not None:
            results[run] = result
    return results


def last_values(metrics_file: Path) -> dict[str, float]:
    """Return the last value of every column of a ``CSVLogger``'s file; empty if there is none."""
    if not metrics_file.is_file():
        return {}
    with open(metrics_file, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = {name: float(value) for row in rows for name, value in row.items() if value}
    return {name: value for name, value in values.items() if name not in ("epoch", "step")}


def _check_is_same(run: Run, result: Result, digests: Mapping[str, str], folder: Path) -> None:
    then, now = redact_arguments(result.command), redact_arguments(run.command)
    changed = [config for config in run.configs if result.configs.get(config) != digests[config]]
    if then == now and not changed:
        return
    before = " ".join(part for part in then if part not in now) or "without it"
    after = " ".join(part for part in now if part not in then) or "without it"
    difference = f"then {before}, now {after}" if then != now else f"the content of {changed[0]} has changed"
    raise ValueError(
        f"The arm '{run.arm}', seed {run.seed}, in {folder / run.place} is finished, but was made by another command "
        f"({difference}). Results of both do not belong into one table: give a new folder, --runs FOLDER, or remove "
        "this one to repeat the run."
    )


def _check_has_metrics(run: Run, result: Result, experiment: Experiment, folder: Path) -> None:
    missing = [metric.name for metric in experiment.metrics if metric.name not in result.metrics]
    if result.outcome == "finished" and missing:
        raise ValueError(
            f"The arm '{run.arm}', seed {run.seed}, in {folder / run.place} is finished, but has logged no "
            f"{missing[0]}. It has {', '.join(result.metrics)}: name one of these below metrics."
        )


def _versions() -> dict[str, str]:
    installed = {name: version(name) for name in ("torch", "torchvision", "lightning")}
    return {"dia-lightning": __version__, "python": platform.python_version(), **installed}
