"""A task and its data, both from a config, or the data of a finished run."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dia_lightning import datamodules
from dia_lightning._config_files import find_config
from dia_lightning.cli import command
from dia_lightning.cli._errors import UserError
from dia_lightning.cli.parsing.own_classes import own_class
from dia_lightning.cli.runs.task_of_run import section_of
from dia_lightning.datamodules import ClassificationDataModule, DetectionDataModule, DIADataModule
from dia_lightning.tasks import DetectionTask, DIATask
from dia_lightning.tasks.base import brief

#: Training options of a config are ignored.
_WITHOUT_TRAINING = ("--trainer.logger", "false", "--trainer.callbacks", "null", "--ckpt_path", "null")


def built_run(configs: Sequence[str], root: str | None) -> tuple[DIATask, DIADataModule]:
    """Return the task of configs, in evaluation mode, and its data, which are downloaded if missing.

    Args:
        configs: files that ``fit`` takes, merged from left to right; the classes that they name are imported.
        root: folder of the data, instead of the config's.

    Raises:
        UserError: if something cannot be built.
        SystemExit: if the config is wrong, with a line on stderr.
    """
    given = [f"--config={config}" for config in configs] + ([] if root is None else ["--data.root", root])
    built = command.rehearse(["fit", *given, *_WITHOUT_TRAINING], trainer=False)
    built.datamodule.prepare_data()
    task: DIATask = built.model.eval()
    return task, built.datamodule


def data_module_of(
    config: str | Path, task: DIATask, root: str | None, *, download: bool | None = None
) -> DIADataModule:
    """Build the data module of a config, and download its data if missing.

    A custom class is imported because the config names it; nothing is imported because of a checkpoint.

    Args:
        config: file with a section ``data``.
        task: what the data are for.
        root: folder of the data, instead of the config's.
        download: whether they may be downloaded, instead of the config's option.

    Raises:
        FileNotFoundError: if the file or the data do not exist.
        ValueError: if its section on the data does not fit, or the task was trained on other data.
    """
    section = _section(find_config(config))
    kind = _kind(str(section.get("class_path", "")), config, task)
    changed = {"root": root, "download": download}
    given = {**(section.get("init_args") or {}), **{name: new for name, new in changed.items() if new is not None}}
    try:
        data: DIADataModule = kind(**given)
    except TypeError as error:
        raise ValueError(f"{config}: the options of {kind.__name__} do not fit: {error}.") from error
    data.prepare_data()
    _check_fits(task, data)
    return data


def _kind(name: str, config: str | Path, task: DIATask) -> type[DIADataModule]:
    """Return the class with a name or path that suits the task."""
    bases = (ClassificationDataModule, DetectionDataModule)
    fits, other = reversed(bases) if isinstance(task, DetectionTask) else bases
    known = _known(fits)
    named = {key: item for item in known for key in (item.__name__, *_paths(item))}
    if name in named:
        return named[name]
    reason = ""
    if "." in name:
        try:
            kind = own_class(name, str(config))
            if inspect.isclass(kind) and issubclass(kind, DIADataModule) and not issubclass(kind, other):
                return kind
        except UserError as error:
            reason = f" ({str(error).rstrip('.')})"
    raise ValueError(
        f"{config}: the data module {name!r} is none of {', '.join(item.__name__ for item in known)}{reason}. Give a "
        f"config with one of them, which {type(task).__name__} takes: -c CONFIG."
    )


def _known(base: type[DIADataModule]) -> list[type[DIADataModule]]:
    """Return the data modules of this package for one kind of label."""
    classes = [item for item in vars(datamodules).values() if inspect.isclass(item) and issubclass(item, base)]
    return [item for item in classes if not inspect.isabstract(item)]


def _check_fits(task: DIATask, data: DIADataModule) -> None:
    """Refuse classes or image shapes that differ from those that a task was trained on."""
    for name, trained, found in (
        ("classes", task.class_names, data.class_names),
        ("images of shape", task.image_shape, getattr(data, "image_shape", None)),
    ):
        if trained is not None and found is not None and list(trained) != list(found):
            raise ValueError(
                f"The checkpoint was trained on {name} {brief(trained)}, but the data have {brief(found)}. "
                "Use the data it was trained on: -c config.yaml of its run, or --root."
            )


def _section(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there, so the data of the run are unknown. Give a config with a section data: -c CONFIG."
        )
    section = section_of(path, "data")
    if section is None:
        raise ValueError(f"{path} has no section 'data'. Give a config that has: -c CONFIG.")
    return section


def _paths(kind: type) -> tuple[str, str]:
    return f"dia_lightning.datamodules.{kind.__name__}", f"{kind.__module__}.{kind.__name__}"
