"""What jsonargparse's nested messages are about: the option and its value."""

import re

_KEY = re.compile(r'Parser key "([^"]+)"')
_GIVEN = re.compile(r"(?:Got|Given) value: (.+?)(?:\. Got value: .+)?$", re.MULTILINE)


def place(message: str) -> str:
    """Return the option that the deepest part of a message is about, such as ``--model.optimizer.lr``."""
    keys, _ = _deepest(message)
    return "--" + ".".join(keys) if keys else "Config"


def body(message: str) -> str:
    """Return the part of a message about that option."""
    return message[_deepest(message)[1] :]


def value(message: str) -> str:
    """Return the value of that option; for a class with options, the path of the class."""
    given = _GIVEN.search(body(message))
    if given is None:
        return ""
    named = re.search(r"class_path'?[=:] ?'([^']+)'", given[1]) or re.match(r"NestedArg\(.*val='([^']*)'\)", given[1])
    return given[1] if named is None else named[1]


def readable(expected: str) -> str:
    """Return a type in readable form."""
    named = re.sub(r"<class '([^']+)'>|typing\.Literal\[([^\]]+)\]", r"\1\2", expected)
    return named.replace("Expected a ", "").replace("NoneType", "null")


def _deepest(message: str) -> tuple[list[str], int]:
    """Return the keys that lead to the deepest part of a message, and the start of that part."""
    found: tuple[list[str], int] = ([], 0)
    above: list[tuple[int, str]] = []
    for match in _KEY.finditer(message):
        line = message[message.rfind("\n", 0, match.start()) + 1 :]
        indent = len(line) - len(line.lstrip())
        above = [*((depth, key) for depth, key in above if depth < indent), (indent, match[1])]
        if len(above) > len(found[0]):
            found = [key for _, key in above], match.start()
    return found
