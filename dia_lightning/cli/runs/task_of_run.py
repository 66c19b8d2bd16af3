"""The task of a run, from its checkpoint, and from its config where its classes are the user's own."""

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
    """Load the task of a checkpoint; its class and attention may be the user's own, if the config of its run says so.

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
        return load_task(checkpoint)  # the config is that of another run
    return _rebuilt(own_class(class_path, str(config)), options, content, config)


def _rebuilt(cls: Any, options: Mapping[str, Any], checkpoint: Mapping[str, Any], config: Path) -> "DIATask":
    """Build a task of the user's own as its config says: its checkpoint may hold what it gave to its base as well."""
    from dia_lightning.tasks import DIATask

    if not (inspect.isclass(cls) and issubclass(cls, DIATask)):
        raise UserError(f"{config}: {cls!r} is no task: derive it from dia_lightning.tasks.DIATask.")
    kept = checkpoint.get("hyper_parameters", {})
    known = init_args(f"{cls.__module__}.{cls.__name__}")
    unused = {"init_from": None, "compile": False}  # weights come from the checkpoint, and nothing is trained
    arguments = {name: unused.get(name, value) for name, value in options.items() if not _is_built(value)}
    for name in ("num_classes", "image_shape"):  # of the data, which no config has
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
    """Tell whether a value of a config is an object, such as an optimizer, which nothing but training needs."""
    return isinstance(value, Mapping) and "class_path" in value


def section_of(config: Path, name: str) -> Mapping[str, Any] | None:
    """Return a part of a config; ``None`` where it has no such part.

    Raises:
        ValueError: if the file is no YAML.
    """
    from dia_lightning import _strict_yaml

    try:
        content = _strict_yaml.load(read_text(config), str(config))
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is no YAML: {error}.") from error
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else None
