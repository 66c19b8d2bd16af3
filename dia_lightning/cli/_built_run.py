"""A task and its data as a config describes them, without training: what ``fit`` would begin with."""

from collections.abc import Sequence

from dia_lightning.cli import command
from dia_lightning.datamodules import DIADataModule
from dia_lightning.tasks import DIATask

#: What a config says about the training has no part in it.
_WITHOUT_TRAINING = ("--trainer.logger", "false", "--trainer.callbacks", "null", "--ckpt_path", "null")


def built_run(configs: Sequence[str], root: str | None) -> tuple[DIATask, DIADataModule]:
    """Return the task of configs, in evaluation mode, and its data, which are fetched if they are not there.

    Args:
        configs: files that ``fit`` takes, merged from left to right; the classes that they name are imported.
        root: folder of the data, in place of that in the config.

    Raises:
        UserError: if something cannot be built.
        SystemExit: if the config is wrong, with a line on stderr.
    """
    given = [f"--config={config}" for config in configs] + ([] if root is None else ["--data.root", root])
    built = command.rehearse(["fit", *given, *_WITHOUT_TRAINING], trainer=False)
    built.datamodule.prepare_data()
    task: DIATask = built.model.eval()
    return task, built.datamodule
