"""Give separate run folders to runs that start at the same instant."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


def claim_versions(loggers: list[Logger]) -> None:
    """Make loggers create the folder of the next version when they choose its number, not later.

    Lightning checks which numbers are taken and makes the folder later, so two runs may end up sharing one.
    Loggers of one run that have the same place share a folder.

    Args:
        loggers: of a Trainer.
    """
    claimed: dict[str, int] = {}
    for logger in loggers:
        if isinstance(logger, CSVLogger | TensorBoardLogger) and "://" not in str(logger.root_dir):
            logger._get_next_version = partial(_claim, logger, claimed)  # type: ignore[method-assign]


def _claim(logger: Any, claimed: dict[str, int]) -> int:
    place = os.path.realpath(logger.root_dir)
    while place not in claimed:
        number: int = type(logger)._get_next_version(logger)
        if getattr(rank_zero_only, "rank", 0) != 0:  # other ranks use rank zero's folder
            return number
        folder = Path(logger.root_dir, f"version_{number}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            if not folder.is_dir():  # otherwise another run was faster
                raise
            continue
        claimed[place] = number
    return claimed[place]
