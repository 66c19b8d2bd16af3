"""Turn errors of Lightning, jsonargparse and torch that the user caused into errors of this program."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from dia_lightning.cli._errors import UserError, is_for_the_user, is_ours
from dia_lightning.cli.runs.checkpoint_misfit import is_while_restoring, misfit, not_restored

_PACKING = ("Does not validate against", "Call to compute_fn of link")


@contextmanager
def while_building() -> Iterator[None]:
    """Report in one line what a class that the parser builds refuses.

    Raises:
        UserError: instead of an error that the user can fix.
    """
    try:
        yield
    except (ValueError, MisconfigurationException) as error:
        cause: BaseException = error
        # jsonargparse wraps what a class of ours raised in messages about types and links
        while str(cause).startswith(_PACKING) and cause.__cause__ is not None:
            cause = cause.__cause__
        wrong_argument = isinstance(cause, TypeError) and is_ours(cause)  # of a network
        if isinstance(cause, ValueError) or wrong_argument or is_for_the_user(cause):
            raise UserError(str(cause)) from cause
        raise cause from None
    except TypeError as error:
        if "`devices`" not in str(error):  # which each accelerator of Lightning checks in its own way
            raise
        raise UserError(f"{error} Use auto, or how many.") from error


@contextmanager
def while_running(ckpt_path: str | None) -> Iterator[None]:
    """Report in one line that a checkpoint does not fit.

    Args:
        ckpt_path: the checkpoint, if there is one.

    Raises:
        UserError: instead of torch's message about weights, or Lightning's about another part of the checkpoint.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise UserError(misfit(str(error), ckpt_path)) from error
    except Exception as error:
        if is_for_the_user(error) or not is_while_restoring(error):
            raise
        raise UserError(not_restored(error, str(ckpt_path))) from error
