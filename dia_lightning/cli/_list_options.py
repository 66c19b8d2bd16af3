"""Options that go to one item of a list: the parser gives them to the last."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

_LISTS = ("trainer.callbacks", "trainer.logger")


def notes_on_lists(args: Sequence[str], config: Any) -> Iterator[str]:
    """Yield which item each option of the command line went to, where there are several.

    Args:
        args: arguments as in a shell.
        config: what the parser made of them.
    """
    for place, arg in enumerate(args):
        match = re.match(r"--(trainer\.\w+)\.([\w.]+)", arg)
        if match is None or match[1] not in _LISTS:
            continue
        items = config.get(match[1])
        added = sum(later.startswith(f"--{match[1]}+") for later in args[place:])  # by then it was not there
        if isinstance(items, list) and added < len(items) > 1:
            name = str(items[-1 - added].class_path).rpartition(".")[2]
            yield (
                f"{match[0]} went to {name}, the last in the list. For options of another, add it before them: "
                f"--{match[1]}+=NAME --{match[1]}.{match[2]} VALUE"
            )
