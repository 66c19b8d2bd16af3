"""Access the parts of a command's parsed config, and find which one an option went to."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dia_lightning.loggers.wandb import default_project

_LISTS = ("trainer.callbacks", "trainer.logger")


def init_args_of(component: Namespace | None) -> dict[str, Any]:
    """Return the options of a part by name; none if the part does not exist."""
    init_args = None if component is None else component.get("init_args")
    return {} if init_args is None else dict(init_args.as_dict())


def is_rate_monitor(callback: Namespace) -> bool:
    """Return whether a callback logs learning rates."""
    return str(callback.class_path).rpartition(".")[2] == "LearningRateMonitor"


def run_roots(trainer: Namespace) -> list[Path]:
    """Return the folders under which this config's runs save their checkpoints."""
    folders = [init_args_of(callback).get("dirpath") for callback in as_list(trainer.callbacks)]
    roots = [Path(folder) for folder in folders if folder is not None]
    for logger in as_list(trainer.logger):
        options = init_args_of(logger)
        folder = options.get("save_dir") or trainer.default_root_dir or "."
        is_wandb = str(logger.class_path).rpartition(".")[2] == "WandbLogger"
        unnamed = default_project() if is_wandb else options.get("name") or "lightning_logs"
        roots.append(Path(folder) / (options.get("project") or unnamed))
    if not as_list(trainer.logger):
        root = Path(trainer.default_root_dir or ".")
        roots += [root / "checkpoints", root / "lightning_logs"]
    return roots


def as_list(value: Any) -> list[Any]:
    """Return the callbacks or loggers of a trainer, whether one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if not isinstance(item, (bool, type(None)))]


def notes_on_lists(args: Sequence[str], config: Any) -> Iterator[str]:
    """Yield which item each option of the command line went to, if there are several.

    Args:
        args: arguments as in a shell.
        config: their parsed config.
    """
    for place, arg in enumerate(args):
        match = re.match(r"--(trainer\.\w+)\.([\w.]+)", arg)
        if match is None or match[1] not in _LISTS:
            continue
        items = config.get(match[1])
        added = sum(later.startswith(f"--{match[1]}+") for later in args[place:])  # did not exist yet
        if isinstance(items, list) and added < len(items) > 1:
            name = str(items[-1 - added].class_path).rpartition(".")[2]
            yield (
                f"{match[0]} went to {name}, the last in the list. For options of another, add it before them: "
                f"--{match[1]}+=NAME --{match[1]}.{match[2]} VALUE"
            )
