"""One line for a mistake on the command line or in a config: what was given, what was expected, and the fix."""

import os
import re
from collections.abc import Callable

from lightning.pytorch.cli import LightningArgumentParser

from dia_lightning._choices import nearest
from dia_lightning._config_files import no_config
from dia_lightning._redact import redact
from dia_lightning.cli import COMMANDS
from dia_lightning.cli.parsing import class_messages
from dia_lightning.cli.parsing.nested_message import place, readable
from dia_lightning.cli.parsing.nested_message import value as _given


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Shorten jsonargparse's message to one line, with the nearest names if a name is unknown.

    Args:
        message: the parser's own message.
        parser: the parser that failed; it knows the options.

    Returns:
        The sentence, or the parser's own message in one line if the case is not known.
    """
    for pattern, describe in _CASES:
        match = re.search(pattern, message, re.MULTILINE)
        if match is not None:
            return describe(match, message, parser)
    return message


def _unknown_option(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    option = f"--{match[1]}"
    return f"Unknown option {option}{nearest(option, _options(parser))}"


def _unknown_argument(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    option = match[1].partition("=")[0]
    if not option.startswith("--"):
        return f"Unexpected argument '{match[1]}'. Options look like --trainer.max_epochs 3."
    return f"Unknown option {option}{nearest(option, _options(parser))}"


def _wrong_value(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    expected, value = match["expected"], redact({place(message): match["value"]})[place(message)]
    choices = re.findall(r"'([^']*)'", expected) if "Literal" in expected else []
    hint = nearest(value, choices) if choices else f". Expected {readable(expected)}."
    return f"{place(message)}: '{value}' does not fit{hint}"


def _wrong_union_value(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    expected = " or ".join(readable(line) for line in re.findall(r"- (.+)", match[1]))
    value = redact({place(message): _given(message)})[place(message)]
    return f"{place(message)}: '{value}' does not fit. Expected {expected}."


def _missing(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    names = [name.strip() for name in match[1].split(",")]
    where = place(message)
    if where == "Config":  # of the command: their names begin with the command's
        return class_messages.missing(", ".join("--" + name.partition(".")[2] for name in names))
    cls = _given(message).rpartition(".")[2]
    return f"{', '.join(f'{where}.{name}' for name in names)} missing: {cls} cannot be built without."


def _missing_file(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    return no_config(os.path.relpath(match[1]))


def _no_command(match: re.Match[str], message: str, parser: LightningArgumentParser) -> str:
    return f"No command given. One of: {', '.join(COMMANDS)}."


def _of_class(describe: Callable[[re.Match[str], str], str]) -> "_Describe":
    return lambda match, message, parser: describe(match, message)


_Describe = Callable[[re.Match[str], str, LightningArgumentParser], str]
_CASES: tuple[tuple[str, _Describe], ...] = (
    (r"Option '([^']+)' is not accepted", _of_class(class_messages.unknown_init_arg)),
    (r"Multiple subclasses with name (\w+)\. .*?: ([\w., ]+)\.", _of_class(class_messages.ambiguous_class)),
    (r"does not accept option '([^']+)'", _unknown_option),
    (r"unrecognized arguments: (\S+)", _unknown_argument),
    (
        r'Parser key "[^"]+":\s+(?P<expected>Expected .+?)\. Got value: (?P<value>.+?)(?:\. Got value: .+)?$',
        _wrong_value,
    ),
    (r"((?:- Expected a <class '(?:float|int|bool|str)'>\s+)+)- Expected a dot import path string", _wrong_union_value),
    (r"(?:to be|to) a subclass of (?:<class ')?(\w+)", _of_class(class_messages.not_a_subclass)),
    (r"Expected an instantiatable class, but .*is abstract", _of_class(class_messages.abstract_class)),
    (r"module '([^']+)' has no attribute '([^']+)'", _of_class(class_messages.no_such_attribute)),
    (r"Expected a dot import path string: \S+|Not a valid subclass of", _of_class(class_messages.unknown_class)),
    (r"No module named", _of_class(class_messages.unknown_class)),
    (
        r"Expected a path but (\S+) either not .+\n(?:.+\n)+?\s+Errors:\s+- (?!Expected)(.+)",
        _of_class(class_messages.cannot_import),
    ),
    (r"the following arguments are required: (.+?)(?:\. Got value: .+)?$", _missing),
    (r"File does not exist: '([^']+)'", _missing_file),
    (r'expected "subcommand" to be one of \{', _no_command),
    (
        r"Union subtypes\s+Subtypes: .+\s+Errors:\s+((?:- Expected .+\s+)+)Given value type: .+\s+Given value: (.+)",
        _wrong_union_value,
    ),
)


def _options(parser: LightningArgumentParser) -> list[str]:
    options: list[str] = []
    for action in parser._actions:
        options += [option for option in action.option_strings if option.startswith("--")]
        commands = action.choices if isinstance(action.choices, dict) else {}
        options += [option for inner in commands.values() for option in _options(inner)]
    return options
