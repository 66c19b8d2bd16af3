"""Loggers that append to the files of an earlier start, where Lightning's begin anew: for resumed runs."""

import csv
import re
import shutil
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from dia_lightning._free_path import free_path
from dia_lightning._text import read_text
from dia_lightning._whole_files import written_whole

_NUMBER = re.compile(r"\d+(\.0)?")  # a spreadsheet may have written the latter


class _AppendingWriter(ExperimentWriter):
    """Lightning's writer deletes a file that is there; this one adds to it, with new columns too."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics_keys = _read(Path(self.metrics_file_path))[0]
        # each start keeps its own
        self.NAME_HPARAMS_FILE = free_path(Path(log_dir, self.NAME_HPARAMS_FILE)).name

    def _check_log_dir_exists(self) -> None:
        """Leave what is there."""


@rank_zero_only
def go_on(logger: CSVLogger | TensorBoardLogger, step: int) -> None:
    """Let a logger add to the files in its folder; call it before its first use.

    Args:
        logger: whose ``version`` is that of the earlier start.
        step: the first one that is trained again; TensorBoard hides what was logged from there on, and
            :func:`drop_rows` takes it from a CSV file.
    """
    if isinstance(logger, CSVLogger):
        logger._experiment = _AppendingWriter(logger.log_dir)
    else:
        logger._kwargs.setdefault("purge_step", step)


@rank_zero_only
def go_on_with_a_copy(logger: CSVLogger, earlier: Path) -> None:
    """Let a logger with a folder of its own add to a copy of the file of an earlier start.

    Args:
        logger: in whose folder nothing is done if there is a file already.
        earlier: the folder with the file of the earlier start.
    """
    name = ExperimentWriter.NAME_METRICS_FILE
    target = Path(logger.log_dir, name)
    if (earlier / name).is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(earlier / name, target)
        logger._experiment = _AppendingWriter(logger.log_dir)


@rank_zero_only
def drop_rows(logger: CSVLogger, step: int, *, tests: bool = False) -> None:
    """Take from a logger's file what comes again: the rows from a step on.

    Args:
        logger: whose file it is.
        step: that of the checkpoint.
        tests: whether the results of tests of the weights at that step are taken away too; later ones are.
    """
    path = Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)
    columns, rows = _read(path)
    kept = [row for row in rows if _precedes(row, step) or (not tests and _is_test(row, step))]
    if not columns:
        return
    with written_whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(kept)


def _precedes(row: dict[str, str], step: int) -> bool:
    return int(float(row["step"])) < step


def _is_test(row: dict[str, str], step: int) -> bool:
    # a test after training is logged with the number of the step that comes next
    filled = {name for name, value in row.items() if value} - {"step", "epoch"}
    return int(float(row["step"])) == step and all(re.match(r"(.*-)?test/", name) for name in filled)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows of a file, without a last row that a killed program has left half written.

    Raises:
        ValueError: if it is no table that a logger of Lightning wrote.
    """
    if not path.is_file():
        return [], []
    text = read_text(path).replace("\0", "")  # which a lost disk or a power cut leaves at the end
    lines = csv.reader(text.splitlines(keepends=True))
    columns = next(lines, [])
    rows = [dict(zip(columns, line, strict=True)) for line in lines if len(line) == len(columns)]
    if columns and not ("step" in columns and all(_NUMBER.fullmatch(row["step"]) for row in rows)):
        raise ValueError(
            f"{path} is not as a CSVLogger wrote it: it has no column step of whole numbers. Move it elsewhere to go "
            "on without what was logged before."
        )
    return columns, rows
