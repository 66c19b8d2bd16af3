"""The command ``reproduce``: train the arms of a comparison over seeds, and write a table with intervals."""

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

from tqdm import tqdm  # type: ignore[import-untyped]

from dia_lightning.cli._errors import PROGRAM, UserError
from dia_lightning.reproduce.comparison import compare
from dia_lightning.reproduce.experiment import Experiment, Run, in_shell, read_experiment
from dia_lightning.reproduce.pool import LOG, locked, run_all
from dia_lightning.reproduce.results import Result, read_results
from dia_lightning.reproduce.table import markdown_table, write_comparison


def run(args: Sequence[str]) -> None:
    """Run what is unfinished, and write the table; exit with code 1 if a run failed.

    Args:
        args: arguments of the command, without its name.
    """
    options = _parser().parse_args(args)
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}.")
    experiment = read_experiment(options.spec)
    chosen = _chosen(experiment, options.only)
    folder = Path(options.runs) / experiment.name
    if options.dry_run:
        _check_commands([run for run in experiment.runs if run.arm in chosen], folder)
        _print_commands(experiment, read_results(experiment, folder))
        return
    with locked(folder) as lock:
        results = read_results(experiment, folder)
        final = {run for run, result in results.items() if result.is_final}
        to_do = [run for run in experiment.runs if run.arm in chosen and run not in final]
        _check_commands(to_do, folder)
        failed = _run_all(to_do, experiment, folder, lock, options.jobs)
    if failed:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dia-lightning reproduce",
        description="Train every arm of a comparison with every seed, and tabulate the results. Finished runs are not "
        "repeated: after an interruption, repeat the command. The runner itself downloads nothing.",
    )
    parser.add_argument("spec", help="what to compare, such as reproduce/digits_sharing.yaml")
    parser.add_argument("--runs", default="runs/reproduce", help="folder for all files (default: runs/reproduce)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="parallel runs, each with its share of the CPU or one GPU (default: 1)"
    )
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run only these arms; the table keeps all of them")
    parser.add_argument("--dry_run", action="store_true", help="print commands and the state of each run, run nothing")
    return parser


def _chosen(experiment: Experiment, only: Sequence[str] | None) -> Sequence[str]:
    for arm in only or ():
        if arm not in experiment.arms:
            raise ValueError(f"--only {arm}: there is no such arm. Arms: {', '.join(experiment.arms)}.")
    return list(experiment.arms) if only is None else only


def _check_commands(runs: Sequence[Run], folder: Path) -> None:
    """Rehearse one command of each arm, so that a mistake in the last arm does not surface after days."""
    from dia_lightning.cli import command  # imports Lightning, which --help does without

    for run in {run.arm: run for run in runs}.values():
        printed = io.StringIO()
        message = ""
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                command.rehearse(run.command_in(folder))
        except UserError as error:
            message = str(error)
        except SystemExit:
            message = printed.getvalue().strip().rpartition("error: ")[2]
        if message:
            raise UserError(f"The arm '{run.arm}' cannot run. {message}")


def _print_commands(experiment: Experiment, results: Mapping[Run, Result]) -> None:
    for run in experiment.runs:
        state = results[run].outcome if run in results else "not run yet"
        print(f"# {run.arm}, seed {run.seed}: {state}\n{in_shell(run.command)}")


def _run_all(runs: Sequence[Run], experiment: Experiment, folder: Path, lock: IO[str], jobs: int) -> int:
    """Run, write the table even if interrupted, and return the number of failed runs."""
    failed = 0
    with tqdm(total=len(runs), desc=experiment.name, unit="run", disable=None) as bar:

        def say(line: str) -> None:
            bar.write(f"{PROGRAM}: {line}", file=sys.stderr)

        def begin(run: Run) -> None:
            say(f"{run.arm}, seed {run.seed}: running, log in {folder / run.place / LOG}")

        def report(run: Run, result: Result) -> None:
            nonlocal failed
            failed += result.outcome == "failed"
            say(_line(run, result, experiment, folder))
            bar.update()

        try:
            run_all(runs, experiment, folder, lock, jobs, begin, report)
        except (KeyboardInterrupt, SystemExit):
            say(f"stopped, {bar.n} of {len(runs)} runs have ended; the same command goes on with the others")
            raise
        finally:
            results = read_results(experiment, folder)
            path = write_comparison(experiment, results, folder)
    for metric in experiment.metrics:
        print(f"{metric.title}\n\n{markdown_table(metric, compare(experiment, results, metric))}")
    print(f"{path}, table.csv and table.png beside it")
    return failed


def _line(run: Run, result: Result, experiment: Experiment, folder: Path) -> str:
    shown = ", ".join(
        f"{metric.name} {result.metrics[metric.name] * metric.scale:.{metric.digits}f} {metric.unit}".strip()
        for metric in experiment.metrics
        if metric.name in result.metrics
    )
    what = shown if result.outcome == "finished" else result.message
    log = f" See {folder / run.place / LOG}" if result.outcome == "failed" else ""
    return f"{run.arm}, seed {run.seed}: {result.outcome} after {result.seconds:.0f} s: {what}{log}"
