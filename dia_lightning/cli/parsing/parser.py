"""Lightning's parser, with errors of one line, plain help, and another order of the types that it tries."""

from argparse import HelpFormatter
from functools import reduce
from operator import or_
from typing import NoReturn, get_args, get_origin

from lightning.pytorch.cli import LightningArgumentParser

from dia_lightning.cli._errors import fail
from dia_lightning.cli.parsing.help import clean, describe_checkpoints
from dia_lightning.cli.parsing.messages import explain


class DIAArgumentParser(LightningArgumentParser):
    """Lightning's parser with errors of one line instead of the whole usage, and no abbreviated options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2."""
        if not self.exit_on_error:  # an inner parser: the outer one adds where it was and comes back here
            super().error(message, ex)
        fail(explain(message, self).removeprefix("Problems parsing config: "))

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Return the help without markup of docstrings."""
        describe_checkpoints(self, self.prog.rpartition(" ")[2])
        clean(self)
        return super().format_help(formatter)


def try_whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Read 1 as one, not as 1.0, where both are possible: ``limit_val_batches`` means one batch by one, all by 1.0.

    ``typing`` takes ``Union[int, float]`` and ``Union[float, int]`` for the same, and hands out the one that any
    package of the process wrote first; the parser tries types in that order.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            others = [kind for kind in kinds if kind is not int]
            action._typehint = reduce(or_, others, int)  # type: ignore[attr-defined]  # `|` keeps the order


def try_lists_of_loggers_first(parser: LightningArgumentParser) -> None:
    """Read a list of loggers, as all shipped configs have it, before a single one: the error of the first try is kept.

    Else what a logger of the list says about its own options would be lost.
    """
    for action in parser._actions:
        if action.dest == "trainer.logger":
            kinds = sorted(get_args(getattr(action, "_typehint", None)), key=lambda kind: get_origin(kind) is None)
            action._typehint = reduce(or_, kinds)  # type: ignore[attr-defined]
