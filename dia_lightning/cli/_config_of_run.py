"""The config that a run wrote beside its checkpoints, in place of one that was not given."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dia_lightning.cli.runs.find_checkpoint import find_checkpoint
from dia_lightning.cli.runs.run_of_checkpoint import config_of

_COMMANDS = ("validate", "test", "predict")


def with_config_of_run(args: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the arguments with the config of the checkpoint's run, where there is no other, and that config.

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
