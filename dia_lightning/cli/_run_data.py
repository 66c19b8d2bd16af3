"""The data of a finished run, from the config that it wrote."""

import inspect
from pathlib import Path
from typing import Any

import yaml

from dia_lightning import datamodules
from dia_lightning._text import read_text
from dia_lightning.cli import _strict_yaml
from dia_lightning.datamodules import ClassificationDataModule, DetectionDataModule, DIADataModule
from dia_lightning.tasks import DetectionTask, DIATask
from dia_lightning.tasks.base import brief


def data_module_of(config: str | Path, task: DIATask, root: str | None) -> DIADataModule:
    """Build the data module of a config, and fetch its data if they are not there.

    Only classes of this package are built: a config that came with a checkpoint must not choose which code runs here.

    Args:
        config: file with a section ``data``.
        task: what the data are for.
        root: folder of the data, in place of that in the config.

    Raises:
        FileNotFoundError: if there is no such file, or there are no data.
        ValueError: if it says nothing that fits about the data, or the task was trained on others.
    """
    section = _section(Path(config))
    name = str(section.get("class_path", ""))
    kind = getattr(datamodules, name.rpartition(".")[2], None)
    known = _known(DetectionDataModule if isinstance(task, DetectionTask) else ClassificationDataModule)
    if kind not in known or name not in (kind.__name__, *_paths(kind)):
        raise ValueError(
            f"{config}: the data module {name!r} is none of {', '.join(item.__name__ for item in known)}. Give a "
            f"config with one of them, which {type(task).__name__} takes: -c CONFIG."
        )
    given = {**(section.get("init_args") or {}), **({} if root is None else {"root": root})}
    try:
        data: DIADataModule = kind(**given)
    except TypeError as error:
        raise ValueError(f"{config}: the options of {kind.__name__} do not fit: {error}.") from error
    data.prepare_data()
    _check_fits(task, data)
    return data


def _known(base: type[DIADataModule]) -> list[type[DIADataModule]]:
    """Return the data modules of this package for one kind of label."""
    classes = [item for item in vars(datamodules).values() if inspect.isclass(item) and issubclass(item, base)]
    return [item for item in classes if not inspect.isabstract(item)]


def _check_fits(task: DIATask, data: DIADataModule) -> None:
    """Refuse other classes or images of another shape than those that a task was trained on."""
    for name, trained, found in (
        ("classes", task.class_names, data.class_names),
        ("images of shape", task.image_shape, getattr(data, "image_shape", None)),
    ):
        if trained is not None and found is not None and list(trained) != list(found):
            raise ValueError(
                f"The checkpoint was trained on {name} {brief(trained)}, but the data have {brief(found)}. "
                "Use the data it was trained on: -c config.yaml of its run, or --root."
            )


def _section(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there, so the data of the run are unknown. Give a config with a section data: -c CONFIG."
        )
    try:
        content = _strict_yaml.load(read_text(path), str(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}.") from error
    section = content.get("data") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path} has no section 'data'. Give a config that has: -c CONFIG.")
    return section


def _paths(kind: type) -> tuple[str, str]:
    return f"dia_lightning.datamodules.{kind.__name__}", f"{kind.__module__}.{kind.__name__}"
