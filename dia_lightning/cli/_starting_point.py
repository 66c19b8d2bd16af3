"""Which checkpoint a command starts from, and what it takes from it."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dia_lightning._redact import redact
from dia_lightning.cli._ensemble import member_paths
from dia_lightning.cli._errors import UserError
from dia_lightning.cli._notes import listing, say
from dia_lightning.cli._taken_arguments import TakenArguments
from dia_lightning.cli.parsing.class_messages import imported
from dia_lightning.cli.parsing.parsed_config import run_roots
from dia_lightning.cli.runs.checkpoint_misfit import check_attention_is_named, check_fits
from dia_lightning.cli.runs.find_checkpoint import find_checkpoint
from dia_lightning.cli.runs.read_checkpoint import (
    check_is_of_run,
    class_names,
    hyper_parameters,
    read_checkpoint,
    without_files,
)
from dia_lightning.cli.runs.run_of_checkpoint import RunSource, config_of, head, source_of
from dia_lightning.cli.runs.slurm import is_of_other_job, saved_before_requeue, taken_by_lightning
from dia_lightning.tasks.checkpoints import check_is_related

# commands that use the config of the checkpoint's run
_COMMANDS = ("validate", "test", "predict")


@dataclass(frozen=True)
class StartingPoint:
    """What a command takes from its checkpoint; empty without one.

    Args:
        taken: hyper-parameters for the task.
        class_names: the classes that the checkpoint was trained on, if it knows them.
        source: the run that a training continues.
    """

    taken: TakenArguments | None = None
    class_names: list[str] | None = None
    source: RunSource | None = None


def with_config_of_run(args: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the arguments with the config of the checkpoint's run added if no other is given, and that config.

    Args:
        args: arguments as in a shell, the command first.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("-c", "--config"), ("--ckpt_path",), ("--model", "--model.class_path")):
        parser.add_argument(*names, nargs="?")
    parser.add_argument("--data", "--data.class_path", nargs="?")
    given, _ = parser.parse_known_args(list(args[1:]))
    is_complete = given.config is not None or (given.model is not None and given.data is not None)
    if not args or args[0] not in _COMMANDS or given.ckpt_path is None or is_complete:
        return list(args), None
    checkpoint = find_checkpoint(given.ckpt_path, [Path("runs")], announce=False)
    config = config_of(Path(checkpoint))
    if not config.is_file():
        return list(args), None
    return [args[0], f"--config={config}", *args[1:], f"--ckpt_path={checkpoint}"], config


def starting_point(command: str, config: Namespace, given: Mapping[str, Any]) -> StartingPoint:
    """Find the checkpoint of a command, and report what is taken from it.

    Args:
        command: its name.
        config: of the command; checkpoint paths in it are resolved to files.
        given: options of the task that the user gave, by name.

    Raises:
        UserError: if the options exclude each other, or the checkpoint needs options that were not given.
        ValueError: if the checkpoint does not exist, is damaged, or is of another task or network.
    """
    if (config.get("ensemble") or config.get("ckpt_path")) and config.model.init_args.get("init_from") is not None:
        config.model.init_args.init_from = None  # the checkpoint has all weights, and the file may be gone
    if config.get("ensemble") is not None:
        return _of_members(command, config)
    if config.get("ckpt_path") is None:
        if command != "fit" and config.model.init_args.get("init_from") is None:
            say("no --ckpt_path: using the network as it is built; for the trained one add --ckpt_path best")
        return StartingPoint()
    config.ckpt_path = find_checkpoint(str(config.ckpt_path), run_roots(config.trainer))
    say(f"checkpoint {config.ckpt_path}")
    # a sharded checkpoint is a folder that keeps its hyper-parameters elsewhere
    sharded = Path(config.ckpt_path).is_dir()
    checkpoint = head(Path(config.ckpt_path)) if sharded else read_checkpoint(config.ckpt_path)
    if not sharded:
        check_is_of_run(checkpoint, config.ckpt_path, command)
        check_is_related(checkpoint["dia_task"], imported(config.model.class_path), config.ckpt_path)
    source = source_of(config.ckpt_path, checkpoint) if command == "fit" else None
    if sharded:
        return StartingPoint(source=source)
    taken = _taken(command, config, given, checkpoint)
    return StartingPoint(taken, class_names(checkpoint), source)


def find_requeued(command: str, config: Namespace, job: str | None) -> bool:
    """Resume as with ``--ckpt_path`` in a requeued job, and where Lightning would do so silently.

    Args:
        command: its name.
        config: of the command; the path is set in it.
        job: the job that the command runs in, if any.

    Returns:
        Whether the training starts over although Lightning would resume from a checkpoint of another job.

    Raises:
        UserError: if a command other than ``fit`` would load such a checkpoint.
    """
    if config.get("ckpt_path") is not None or config.get("ensemble") is not None:
        return False
    found = taken_by_lightning(Path(config.trainer.default_root_dir or "."))
    if command != "fit":
        if found:
            raise UserError(
                f"Lightning would load {found[0]}, which a training in a job of SLURM has left. Say what you want: "
                "--ckpt_path best, last or a file; or move it elsewhere to use the network as it is built."
            )
        return False
    own = (path for path in found if not is_of_other_job(path, job))
    requeued = saved_before_requeue(job, run_roots(config.trainer)) or next(own, None)
    if requeued is not None:
        say(f"the job was queued again: going on from {requeued}; to begin anew move it elsewhere")
        config.ckpt_path = str(requeued)
    return bool(found) and requeued is None


def _of_members(command: str, config: Namespace) -> StartingPoint:
    """Find the checkpoints of an ensemble, and build the first one's network instead of the config's."""
    if command == "fit":
        raise UserError("--ensemble is for validate, test and predict. Train its members one by one.")
    if config.get("ckpt_path") is not None:
        raise UserError("--ensemble and --ckpt_path exclude each other. Give all members to --ensemble.")
    config.ensemble = member_paths(config.ensemble, run_roots(config.trainer))
    for number, path in enumerate(config.ensemble):
        say(f"member{number} is {path}")
    first = config.ensemble[0]
    checkpoint = read_checkpoint(first)
    found = _found_in(checkpoint, config.model.class_path, first)
    init_args = config.model.init_args
    taken = TakenArguments(first, {name: found[name] for name in found if name in init_args})
    return StartingPoint(taken, class_names(checkpoint))


def _found_in(checkpoint: dict[str, Any], class_path: str, path: str) -> dict[str, Any]:
    found, strange = hyper_parameters(checkpoint, class_path, path)
    if strange:
        say(
            f"not taken from the checkpoint, because it is no plain data: {', '.join(strange)}. Options that need "
            "classes come from the command or the config"
        )
    return found


def _taken(command: str, config: Namespace, given: Mapping[str, Any], checkpoint: dict[str, Any]) -> TakenArguments:
    found = _found_in(checkpoint, config.model.class_path, config.ckpt_path)
    if found:
        check_attention_is_named(given, checkpoint, config.ckpt_path)
    shown = redact(given)  # as in the checkpoint
    check_fits(shown, found, config.ckpt_path)
    init_args = config.model.init_args
    taken = {
        name: value
        for name, value in found.items()
        if name in init_args and name not in given and init_args[name] != value
    }
    compared = without_files(shown, found)
    changed = {name: value for name, value in found.items() if name in compared and compared[name] != value}
    if taken:
        say(f"from the checkpoint: {listing(taken)}")
    if changed:
        kept = {name: shown[name] for name in changed}
        say(f"given and kept: {listing(kept)}; the checkpoint has {listing(changed)}")
    if changed and command == "fit":
        say(
            "resuming restores the optimizer and the schedule as they were; "
            "to start anew from the weights alone, use --model.init_from instead of --ckpt_path"
        )
    return TakenArguments(config.ckpt_path, taken)
