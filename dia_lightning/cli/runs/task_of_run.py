"""The task of a run, from its checkpoint, and from its config for custom classes."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dia_lightning._text import read_text
from dia_lightning.cli._errors import UserError
from dia_lightning.cli.parsing.class_messages import init_args
from dia_lightning.cli.parsing.own_classes import CLASS_PATH, import_attention, own_class
from dia_lightning.cli.runs.read_checkpoint import read_checkpoint
from dia_lightning.cli.runs.run_of_checkpoint import config_of

if TYPE_CHECKING:  # imports Lightning
    from dia_lightning.tasks import DIATask


def task_of_run(checkpoint: Path) -> "DIATask":
    """Load the task of a checkpoint; its class and attention may be custom if the config of its run names them.

    Raises:
        ValueError: if it cannot be loaded.
        UserError: if a class cannot be imported.
    """
    from dia_lightning.tasks import load_task

    config = config_of(checkpoint)
    section = (section_of(config, "model") if config.is_file() else None) or {}
    class_path, options = str(section.get("class_path")), section.get("init_args") or {}
    import_attention(options.get("attention"), str(config))
    if CLASS_PATH.fullmatch(class_path) is None or class_path.startswith("dia_lightning."):
        return load_task(checkpoint)
    content = read_checkpoint(str(checkpoint))
    if content.get("dia_task") != class_path.rpartition(".")[2]:
        return load_task(checkpoint)  # the config belongs to another run
    return _rebuilt(own_class(class_path, str(config)), options, content, config)


def _rebuilt(cls: Any, options: Mapping[str, Any], checkpoint: Mapping[str, Any], config: Path) -> "DIATask":
    """Build a custom task from its config: its checkpoint may also hold arguments that it passed to its base."""
    from dia_lightning.tasks import DIATask

    if not (inspect.isclass(cls) and issubclass(cls, DIATask)):
        raise UserError(f"{config}: {cls!r} is no task: derive it from dia_lightning.tasks.DIATask.")
    kept = checkpoint.get("hyper_parameters", {})
    known = init_args(f"{cls.__module__}.{cls.__name__}")
    unused = {"init_from": None, "compile": False}  # weights come from the checkpoint, and nothing is trained
    arguments = {name: unused.get(name, value) for name, value in options.items() if not _is_built(value)}
    for name in ("num_classes", "image_shape"):  # from the data, not in any config
        if name in known and name in kept:
            arguments[name] = kept[name]
    try:
        task: DIATask = cls(**arguments)
        task.on_load_checkpoint(dict(checkpoint))
        task.load_state_dict(checkpoint["state_dict"])
    except (TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{cls.__name__} as {config} has it does not fit the checkpoint: {reason}") from error
    return task.eval()


def _is_built(value: Any) -> bool:
    """Return whether a value in a config is an object, such as an optimizer, which only training needs."""
    return isinstance(value, Mapping) and "class_path" in value


def section_of(config: Path, name: str) -> Mapping[str, Any] | None:
    """Return a part of a config; ``None`` if it has no such part.

    Raises:
        ValueError: if the file is not YAML.
    """
    from dia_lightning import _strict_yaml

    try:
        content = _strict_yaml.load(read_text(config), str(config))
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is no YAML: {error}.") from error
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else None
