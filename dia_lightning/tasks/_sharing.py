"""Tasks as folders, local and on the Hugging Face Hub."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from dia_lightning import _hub
from dia_lightning._hyperparameters import OBJECT, from_file, primitive
from dia_lightning._redact import redact
from dia_lightning.tasks._from_checkpoint import build
from dia_lightning.tasks._trainer import trainer_of
from dia_lightning.tasks.base import DIATask, brief
from dia_lightning.tasks.checkpoints import task_named

Task = TypeVar("Task", bound=DIATask)

#: The entries of a config, and their types.
_KINDS: dict[str, Any] = {
    "dia_task": str,
    "hyper_parameters": dict,
    "data": dict,
    "trained_steps": int | None,
    "versions": dict,
}
#: Facts about the data, and the types of their entries.
_FACTS: dict[str, Any] = {"class_names": str, "image_shape": int, "mean": int | float, "std": int | float}
_PIPELINES = {
    "ClassificationTask": "image-classification",
    "DetectionTask": "object-detection",
    "DiffusionTask": "unconditional-image-generation",
}
_CARD = """---
library_name: dia-lightning
{pipeline}tags:
- attention
- dia-lightning
- pytorch-lightning
---

# {network}

A `{task}` of dia-lightning {version} ([arXiv 2210.16101](https://arxiv.org/abs/2210.16101)).

```python
from dia_lightning.tasks import {task}
task = {task}.from_pretrained("this folder or repository")
```

{facts}
"""


def write(task: DIATask, folder: str | os.PathLike[str], metrics: Mapping[str, float] | None) -> Path:
    """Write weights, config and model card of a task; ``metrics`` are those of the Trainer if there are none."""
    config = {
        "dia_task": type(task).__name__,
        # names that begin with _ are Lightning's, which would run what they name
        "hyper_parameters": redact(primitive({key: value for key, value in task.hparams.items() if key[:1] != "_"})),
        "data": primitive(task._data),
        "trained_steps": task.global_step or task.trained_steps,
        "versions": _hub.versions(),
    }
    return _hub.write_folder(folder, task, config, _card(task, _metrics(task) if metrics is None else metrics))


def read(kind: type[Task], folder: Path, given: dict[str, Any]) -> Task:
    """Return the task of a folder, of the class ``kind`` or a subclass, in evaluation mode.

    Raises:
        ValueError: if the folder is damaged or holds a different task, or an object is not ``given``.
    """
    path, config = str(folder / _hub.CONFIG), _hub.read_config(folder)
    wrong = [f"{name} is missing" for name in ("dia_task", "hyper_parameters") if name not in config]
    wrong += [f"{name!r} is unknown" for name in config if name not in _KINDS]
    wrong += [
        f"{name} is {value!r:.100}" for name, value in config.items() if not isinstance(value, _KINDS.get(name, object))
    ]
    if wrong:
        raise ValueError(f"{path!r} is not a config of a dia-lightning task: {'; '.join(wrong)}.")
    found = task_named(config["dia_task"], path)
    if not issubclass(found, kind):
        raise ValueError(
            f"{str(folder)!r} holds a {found.__name__}, not a {kind.__name__}: {found.__name__}.from_pretrained(...)."
        )
    checkpoint = {
        "dia_task": found.__name__,
        "dia_data": _data(config.get("data", {}), path),
        "global_step": config.get("trained_steps"),
        "state_dict": _hub.read_weights(folder),
        "hyper_parameters": _arguments(found, config["hyper_parameters"], given, path),
    }
    try:
        task = build(found, checkpoint, given, path)
    except ImportError:
        raise
    except Exception as error:  # values of wrong types and weights of wrong shapes fail in many ways
        raise ValueError(
            f"{str(folder)!r} does not hold a {found.__name__} ({type(error).__name__}: {_hub.in_one_line(error)})."
        ) from error
    return task.eval()


def _arguments(kind: type[DIATask], found: dict[str, Any], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the hyperparameters of a task as its constructor takes them.

    Raises:
        ValueError: if one is unknown, stands for code, or was an object and is not given.
    """
    code = [*from_file(found, path)[1], *(name for name in found if name.startswith("_"))]
    if code:
        raise ValueError(f"{path!r} names code to run ({code[0]}). Configs of tasks hold names and numbers only.")
    known = kind.option_names() - {"init_from"}  # which would read another file
    strange = [name for name in found if name not in known]
    if strange:
        raise ValueError(f"{path!r}: {kind.__name__} takes no {strange[0]!r}. Update dia-lightning, or remove it.")
    arguments = {name: value for name, value in found.items() if name != "compile" and name not in given}
    for name, value in list(arguments.items()):
        if OBJECT not in repr(value):
            continue
        if name in ("optimizer", "schedule"):
            del arguments[name]
            rank_zero_warn(
                f"The task was trained with an object as {name} ({value!r:.100}), which no file can hold. To continue "
                f"training, give it again: from_pretrained(..., {name}=...)."
            )
        else:
            raise ValueError(
                f"The task was trained with an object as {name} ({value!r:.100}), which no file can hold. Give it "
                f"again: {kind.__name__}.from_pretrained(..., {name}=...)."
            )
    return arguments


def _data(facts: dict[str, Any], path: str) -> dict[str, Any]:
    """Return facts about the data.

    Raises:
        ValueError: if one has the wrong type.
    """
    for name, value in facts.items():
        of = _FACTS.get(name, str | int | float)
        if not isinstance(value, list) or not all(isinstance(item, of) for item in value):
            raise ValueError(f"{path!r}: {name} is {value!r:.100}.")
    return facts


def _metrics(task: DIATask) -> dict[str, float]:
    trainer = trainer_of(task)
    logged = {} if trainer is None else trainer.callback_metrics
    return {name: float(value) for name, value in logged.items() if name.startswith(("val/", "test/"))}


def _card(task: DIATask, metrics: Mapping[str, float]) -> str:
    name = type(task).__name__
    given: Mapping[str, Any] = task.hparams
    facts = [f"- Classes: {brief(task.class_names)}"] if task.class_names else []
    facts += [f"- Images: {list(task.image_shape)} (C, H, W)"] if task.image_shape else []
    if task.normalization is not None:
        mean, std = task.normalization
        facts.append(f"- Images are given minus {list(mean)}, divided by {list(std)}, per channel.")
    if metrics:
        rows = [f"| {key} | {value:.4g} |" for key, value in metrics.items()]
        facts += ["", "| metric | value |", "|---|---|", *rows]
    parts = [str(given[part]) for part in ("detector", "backbone", "attention") if given.get(part) is not None]
    pipeline = next((_PIPELINES[base.__name__] for base in type(task).__mro__ if base.__name__ in _PIPELINES), None)
    return _CARD.format(
        pipeline=f"pipeline_tag: {pipeline}\n" if pipeline else "",
        network=" with ".join(parts).replace(OBJECT, ""),
        task=name,
        version=_hub.versions()["dia_lightning"],
        facts="\n".join(facts),
    )
