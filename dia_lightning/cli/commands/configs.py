"""The command ``configs``: the package's configs, each with its first line, and their paths."""

import argparse
from collections.abc import Sequence

from dia_lightning._config_files import FOLDER, config_names, find_config, no_config
from dia_lightning._text import read_text


def run(args: Sequence[str]) -> None:
    """Print the list, or the path of one.

    Args:
        args: arguments of the command, without its name.

    Raises:
        FileNotFoundError: if there is no such config.
    """
    parser = argparse.ArgumentParser(
        "dia-lightning configs",
        description="List the configs that come with the package. Give their names to -c and reproduce; a file of the "
        "same path in the working directory takes precedence.",
    )
    parser.add_argument("name", nargs="?", help="print the path of this one, to copy it or pass it to another program")
    name = parser.parse_args(args).name
    if name is None:
        _print_all()
        return
    path = find_config(name)
    if not path.is_file():
        raise FileNotFoundError(no_config(name))
    print(path)


def _print_all() -> None:
    width = max(map(len, config_names()), default=0)
    for name in config_names():
        print(f"{name:<{width}}  {read_text(FOLDER / name).partition(chr(10))[0].removeprefix('#').strip()}")
