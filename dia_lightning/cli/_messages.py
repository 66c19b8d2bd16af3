"""One line for a mistake on the command line or in a config: what was given, what was meant, how to go on."""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from dia_lightning.cli._errors import fail


class DIAArgumentParser(LightningArgumentParser):
    """Lightning's parser with errors of one line instead of the whole usage, and no abbreviated options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2."""
        if not self.exit_on_error:  # an inner parser: the outer one adds where it was and comes back here
            super().error(message, ex)
        fail(explain(message, self).removeprefix("Problems parsing config: "))


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Say in one line what jsonargparse says in many, with the nearest names where a name is unknown.

    Args:
        message: the parser's own message.
        parser: the parser that failed; it knows the options.

    Returns:
        The sentence; the parser's own words in one line when the case is none of the known ones.
    """
    for pattern, describe in _CASES:
        match = re.search(pattern, message)
        if match is not None:
            return describe(match, message, parser)
    return message


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known ones, or all of them if they are few."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return ". Did you mean " + " or ".join(f"'{item}'" for item in close) + "?"
    if 0 < len(names) <= 20:
        return f". Known: {', '.join(names)}."
    return "."


def _unknown_init_arg(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    class_path, option = match[1], match[2]
    known = _init_args(class_path)
    return f"{_place(message)}.{option}: {class_path.rpartition('.')[2]} has no such option{nearest(option, known)}"


def _unknown_option(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    option = f"--{match[1]}"
    return f"Unknown option {option}{nearest(option, _options(parser))}"


def _unknown_argument(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    option = match[1].partition("=")[0]
    if not option.startswith("--"):
        return f"Unexpected argument '{match[1]}'. Options look like --trainer.max_epochs 3."
    return f"Unknown option {option}{nearest(option, _options(parser))}"


def _unknown_class(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    known = _subclass_names(message)
    given = [path for path in re.findall(r"'class_path': '([^']+)'", message) if path.rpartition(".")[2] not in known]
    name = given[0] if given else match.groupdict().get("name") or "(none)"
    missing = re.search(r"No module named '[^']+'", message)
    if missing is not None:
        return f"{_place(message)}: cannot import the class: {missing[0]}."
    choices = re.search(r"Expected a typing\.Literal\[([^\]]+)\]\s+- Expected a dot import path", message)
    if choices is not None:
        return f"{_place(message)}: '{name}' is neither of {choices[1]}, nor the path of a class."
    return f"{_place(message)}: there is no class '{name}'{nearest(name.rpartition('.')[2], known)}"


def _ambiguous_class(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    return f"{_place(message)}: there are several classes named {match[1]}. Give one by its path: {match[2]}."


def _wrong_value(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    expected, value = match["expected"], match["value"]
    choices = re.findall(r"'([^']*)'", expected) if "Literal" in expected else []
    hint = nearest(value, choices) if choices else f". Expected {_readable(expected)}."
    return f"{_place(message)}: '{value}' does not fit{hint}"


def _wrong_union_value(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    expected = " or ".join(_readable(line) for line in re.findall(r"- (.+)", match[1]))
    return f"{_place(message)}: '{match[2]}' does not fit. Expected {expected}."


def _wrong_choice(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    return f"Unknown command '{match[1]}'{nearest(match[1], [*re.findall(r'[a-z]+', match[2]), 'models'])}"


def _missing(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    options = ", ".join("--" + name.strip().partition(".")[2] for name in match[1].split(","))
    return f"{options} missing: give a config (-c configs/classification/digits.yaml, -c <run folder>/config.yaml)."


def _missing_file(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    path = Path(os.path.relpath(match[1]))
    near = {other.name: other for other in (*Path("configs").rglob("*.yaml"), *path.parent.glob("*.yaml"))}
    close = difflib.get_close_matches(path.name, near, n=1, cutoff=0.6)
    return f"There is no file {path}." + (f" Did you mean {near[close[0]]}?" if close else "")


def _no_command(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    return f"No command given. One of: {match[1].replace(',', ', ')}, models."


_CASES: tuple[tuple[str, Callable[[re.Match[str], str, LightningArgumentParser], str]], ...] = (
    (r"given class_path '([^']+)':\s+Option '([^']+)' is not accepted", _unknown_init_arg),
    (r"Multiple subclasses with name (\w+)\. .*?: ([\w., ]+)\.", _ambiguous_class),
    (r"does not accept option '([^']+)'", _unknown_option),
    (r"unrecognized arguments: (\S+)", _unknown_argument),
    (r'Parser key "[^"]+":\s+(?P<expected>Expected .+)\. Got value: (?P<value>.+)', _wrong_value),
    (r"Expected a dot import path string: (?P<name>\S+)", _unknown_class),
    (r"Not a valid subclass of|No module named", _unknown_class),
    (r"invalid choice: '([^']+)' \(choose from ([^)]+)\)", _wrong_choice),
    (r"the following arguments are required: (.+)", _missing),
    (r"File does not exist: '([^']+)'", _missing_file),
    (r'expected "subcommand" to be one of \{([^}]+)\}', _no_command),
    (
        r"Union subtypes\s+Subtypes: .+\s+Errors:\s+((?:- Expected .+\s+)+)Given value type: .+\s+Given value: (.+)",
        _wrong_union_value,
    ),
)


def _place(message: str) -> str:
    keys = re.findall(r'Parser key "([^"]+)"', message)
    return "--" + ".".join(dict.fromkeys([keys[0], keys[-1]])) if keys else "Config"


def _readable(expected: str) -> str:
    named = re.sub(r"<class '([^']+)'>|typing\.Literal\[([^\]]+)\]", r"\1\2", expected)
    return named.replace("Expected a ", "").replace("NoneType", "null")


def _options(parser: LightningArgumentParser) -> list[str]:
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    for action in parser._actions:
        commands = action.choices if isinstance(action.choices, dict) else {}
        options += [option for inner in commands.values() for option in _options(inner)]
    return options


def _init_args(class_path: str) -> list[str]:
    """Return the options of a class that has been imported already; an error message never imports anything."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    if not isinstance(cls, type):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named: list[str] = []
    for base in (base for base in cls.__mro__[:-1] if "__init__" in vars(base)):
        parameters = inspect.signature(base.__dict__["__init__"]).parameters.values()
        named += [item.name for item in parameters if item.kind in kinds]
        if all(item.kind != inspect.Parameter.VAR_KEYWORD for item in parameters):
            break  # nothing reaches the bases by name
    return [name for name in named if name != "self"]


def _subclass_names(message: str) -> list[str]:
    subtypes = re.search(r"Subtypes: \[(.+)\]", message)
    names = []
    for path in re.findall(r"[A-Za-z_]\w*(?:\.\w+)+", subtypes[1] if subtypes is not None else ""):
        module, _, name = path.rpartition(".")
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type):
            names += _names_below(base)
    return names


def _names_below(base: type[Any]) -> list[str]:
    below = [cls for cls in base.__subclasses__() if not cls.__name__.startswith("_")]
    return [cls.__name__ for cls in below] + [name for cls in below for name in _names_below(cls)]
