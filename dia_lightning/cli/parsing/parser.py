"""Lightning's parser, with one-line errors, plain help, and a different order of the types that it tries."""

from argparse import HelpFormatter
from functools import reduce
from operator import or_
from typing import NoReturn, get_args, get_origin

from lightning.pytorch.cli import LightningArgumentParser

from dia_lightning.cli._errors import fail
from dia_lightning.cli.parsing.help import clean, describe_checkpoints
from dia_lightning.cli.parsing.messages import explain


class DIAArgumentParser(LightningArgumentParser):
    """Lightning's parser with one-line errors instead of the whole usage, and no abbreviated options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2."""
        if not self.exit_on_error:  # an inner parser: the outer one adds the place and returns here
            super().error(message, ex)
        fail(explain(message, self).removeprefix("Problems parsing config: "))

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Return the help without docstring markup."""
        describe_checkpoints(self, self.prog.rpartition(" ")[2])
        clean(self)
        return super().format_help(formatter)


def try_whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Read 1 as an int, not as 1.0, if both are possible: ``limit_val_batches`` 1 means one batch, 1.0 means all.

    ``typing`` treats ``Union[int, float]`` and ``Union[float, int]`` as equal, and returns the one that any package
    of the process created first; the parser tries types in that order.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            others = [kind for kind in kinds if kind is not int]
            action._typehint = reduce(or_, others, int)  # type: ignore[attr-defined]  # `|` keeps the order


def try_lists_of_loggers_first(parser: LightningArgumentParser) -> None:
    """Try a list of loggers, as in all shipped configs, before a single one: the error of the first try is kept.

    Otherwise the errors of a listed logger about its own options would be lost.
    """
    for action in parser._actions:
        if action.dest == "trainer.logger":
            kinds = sorted(get_args(getattr(action, "_typehint", None)), key=lambda kind: get_origin(kind) is None)
            action._typehint = reduce(or_, kinds)  # type: ignore[attr-defined]
