"""The config of a run, written next to its results and sent to W&B, without secrets."""

from pathlib import Path

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from dia_lightning._free_path import free_path
from dia_lightning._redact import redact
from dia_lightning._whole_files import written_whole
from dia_lightning.callbacks import run_folder
from dia_lightning.cli._errors import UserError
from dia_lightning.cli.parsing import config_reader
from dia_lightning.cli.runs._resume import KeepRunTogether
from dia_lightning.cli.runs.run_of_checkpoint import START

WANDB_ID = "wandb-id.txt"  # in the run folder: the W&B run that the next training may resume


class SaveRunConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run's folder; never over another run's, never with a secret in it.

    Lightning's own callback stops the second run in a folder if no logger makes a folder per run. A resumed run has
    several configs, each with the step from which it applies.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, before training, validation, test or prediction starts."""
        if self.already_saved:
            return
        self.already_saved = True
        folder = run_folder(trainer)  # on every rank, so that they agree on one
        if trainer.is_global_zero:
            sources = [each.source for each in trainer.callbacks if isinstance(each, KeepRunTogether)]  # type: ignore[attr-defined]
            self._write(folder, trainer, sum(source.step for source in sources if source is not None))

    def _write(self, folder: Path, trainer: Trainer, step: int) -> None:
        config_reader.install()  # a process started with a copy of the parser does not know its mode
        try:
            text = self.parser.dump(self.config, skip_none=False)
        except TypeError as error:  # command line values were checked before
            reason = next((line.strip(" -") for line in str(error).splitlines() if "Parser key" in line[1:]), error)
            raise UserError(
                f"The hyper-parameters of the checkpoint do not fit its task, which no config can be written of: "
                f"{' '.join(str(reason).split())[:300]}. Give the option that is wrong, or another checkpoint."
            ) from error
        header = [line for line in text.splitlines() if line.startswith("#")]
        if step > 0:
            header.insert(0, f"{START}{step}")
        config = redact(yaml.safe_load(text))
        folder.mkdir(parents=True, exist_ok=True)
        body = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        with written_whole(free_path(folder / self.config_filename)) as part:
            part.write_text("\n".join([*header, body]), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"cli": config})
                (folder / WANDB_ID).write_text(f"{logger.version}\n", encoding="utf-8")


def wandb_id(folder: Path) -> str | None:
    """Return the id of the W&B run that the training in a run folder was logged to; ``None`` if it was not.

    A run resumed after a stop mid-epoch logs the steps since its newest checkpoint a second time.
    """
    file = folder / WANDB_ID
    return (file.read_text(encoding="utf-8").strip() or None) if file.is_file() else None
