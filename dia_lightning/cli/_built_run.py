"""A task and its data as a config describes them, without training: what ``fit`` would begin with."""

import logging
from collections.abc import Sequence
from typing import Any

from dia_lightning.cli.command import DIACLI
from dia_lightning.datamodules import DIADataModule
from dia_lightning.tasks import DIATask

#: What a config says about the training has no part in it.
_WITHOUT_TRAINING = ("--trainer.logger", "false", "--trainer.callbacks", "null", "--ckpt_path", "null")


class _BuiltRun(DIACLI):
    """Parses and builds task and data, and no trainer, whose devices may be elsewhere."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Leave the trainer out."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def built_run(configs: Sequence[str], root: str | None) -> tuple[DIATask, DIADataModule]:
    """Return the task of configs, in evaluation mode, and its data, which are fetched if they are not there.

    Args:
        configs: files that ``fit`` takes, merged from left to right; the classes that they name are imported.
        root: folder of the data, in place of that in the config.

    Raises:
        UserError: if something cannot be built.
        SystemExit: if the config is wrong, with a line on stderr.
    """
    data = () if root is None else ("--data.root", root)
    logging.disable(logging.INFO)  # seeds and other news of a training
    try:
        built = _BuiltRun(["fit", *(f"--config={config}" for config in configs), *_WITHOUT_TRAINING, *data])
    finally:
        logging.disable(logging.NOTSET)
    built.datamodule.prepare_data()
    task: DIATask = built.model.eval()
    return task, built.datamodule
