"""Messages about classes that an option names."""

import inspect
import re
import sys
from typing import Any

from dia_lightning._choices import nearest
from dia_lightning.cli.parsing.nested_message import body, place, value

#: Advice for a custom class that is not one of these.
_ADVICE = {
    "DIADataModule": ", from which a task has its classes. Derive it from ClassificationDataModule or "
    "DetectionDataModule of dia_lightning.datamodules, and define class_names and load_split",
    "DIATask": ". Derive it from dia_lightning.tasks.DIATask, or from one of the tasks there",
}


def unknown_init_arg(match: re.Match[str], message: str) -> str:
    """A class takes no such option."""
    option = match[1]
    class_path = _class_of_options(message)
    if class_path.endswith((".DIATask", ".DIADataModule")):  # no class was given, so the options are the base's
        return missing("--" + place(message).removeprefix("--").partition(".")[0])
    if class_path.endswith((".Optimizer", ".LRScheduler")):
        return option_of_a_name(option, message)
    where, name = place(message), class_path.rpartition(".")[2]
    sentence = f"{where}.{option}: {name} has no such option{nearest(option, init_args(class_path))}"
    if where in ("--trainer.callbacks", "--trainer.logger") and "NestedArg(" in message:
        sentence += f" Options go to the last in the list; add another before its options: {where}+=NAME."
    return sentence


def option_of_a_name(option: str, message: str) -> str:
    """An option was given to an optimizer or schedule that is a short name, or missing."""
    where = place(message)
    example = "torch.optim.lr_scheduler.StepLR" if where.endswith("schedule") else "torch.optim.AdamW"
    return (
        f"{where}.{option}: what is given by a short name takes its options from the task, as in --model.{option}. "
        f"Or give a class before its options: {where} {example}."
    )


def missing(options: str) -> str:
    """Required options are missing."""
    return (
        f"{options} missing: give a config (-c classification/digits.yaml, -c <run folder>/config.yaml), or "
        "for validate, test and predict a checkpoint, whose run has one (--ckpt_path best)."
    )


def unknown_class(match: re.Match[str], message: str) -> str:
    """There is no such class."""
    known = _subclass_names(message)
    name = value(message)
    absent = re.search(r"No module named '[^']+'", message)
    if absent is not None:
        return f"{place(message)}: cannot import the class: {absent[0]}."
    literal = re.search(r"Expected a typing\.Literal\[([^\]]+)\]\s+- Expected a dot import path string: (\S+)", message)
    if literal is not None:
        nested = re.search(r"NestedArg\(key='(\w+)'", body(message)) or re.search(r"'init_args': {'(\w+)'", message)
        if f"'{literal[2]}'" in literal[1] and nested is not None:
            return option_of_a_name(nested[1], message)
        return f"{place(message)}: '{literal[2]}' is none of {literal[1]}, and no path of a class."
    return f"{place(message)}: there is no class '{name}'{nearest(name.rpartition('.')[2], known)}"


def ambiguous_class(match: re.Match[str], message: str) -> str:
    """Several classes have the name."""
    return f"{place(message)}: there are several classes named {match[1]}. Give one by its path: {match[2]}."


def not_a_subclass(match: re.Match[str], message: str) -> str:
    """The name is that of something else."""
    name, base = value(message), match[1]
    found = imported(name)
    kind = next((item.__name__ for item in _bases(found) if item.__module__.startswith("lightning.")), "")
    but = f"a {kind}, but " if kind else ""
    return f"{place(message)}: {name} is {but}no {base}{_ADVICE.get(base, '')}."


def abstract_class(match: re.Match[str], message: str) -> str:
    """A class does not implement its base's abstract members."""
    name = value(message)
    lacking = sorted(getattr(imported(name), "__abstractmethods__", ()))
    if not lacking:  # no class was given, so the base was used
        return missing(place(message))
    return f"{place(message)}: {name} cannot be built, because it does not define {', '.join(lacking)}."


def no_such_attribute(match: re.Match[str], message: str) -> str:
    """A module has no such class."""
    module = sys.modules.get(match[1])
    known = [name for name, item in vars(module).items() if isinstance(item, type)] if module is not None else []
    return f"{place(message)}: {match[1]} has no class '{match[2]}'{nearest(match[2], known)}"


def cannot_import(match: re.Match[str], message: str) -> str:
    """A module failed to import."""
    return f"{place(message)}: cannot import {match[1]}: {match[2].rstrip('.')}."


def imported(class_path: str) -> Any:
    """Return the object at a path if it has been imported already; an error message never imports anything."""
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def init_args(class_path: str) -> list[str]:
    """Return the options of an already imported class."""
    cls = imported(class_path)
    if not isinstance(cls, type):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named: list[str] = []
    for base in (base for base in cls.__mro__[:-1] if "__init__" in vars(base)):
        parameters = inspect.signature(base).parameters.values()
        named += [item.name for item in parameters if item.kind in kinds]
        if all(item.kind != inspect.Parameter.VAR_KEYWORD for item in parameters):
            break  # options do not reach the bases by name
    return named


def _class_of_options(message: str) -> str:
    """Return the class that does not take an option."""
    inside = re.search(r"is not accepted\. Got value: Namespace\(class_path='([^']+)'", message)
    before = re.search(r"given class_path '([^']+)':\s+Option", message)
    found = inside or before
    return "" if found is None else found[1]


def _bases(cls: Any) -> tuple[type, ...]:
    return cls.__mro__ if isinstance(cls, type) else ()


def _subclass_names(message: str) -> list[str]:
    subtypes = re.search(r"Subtypes: \[(.+)\]", message)
    names = []
    for path in re.findall(r"[A-Za-z_]\w*(?:\.\w+)+", subtypes[1] if subtypes is not None else ""):
        base = imported(path)
        if isinstance(base, type):
            names += _names_below(base)
    return names


def _names_below(base: type[Any]) -> list[str]:
    below = [cls for cls in base.__subclasses__() if not cls.__name__.startswith("_")]
    return [cls.__name__ for cls in below] + [name for cls in below for name in _names_below(cls)]
