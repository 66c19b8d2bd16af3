"""The config of a run, written beside its results and sent to W&B, without secrets."""

import re
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from dia_lightning.callbacks import run_folder

_SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


class SaveRunConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run's folder; never over another run's, never with a secret in it.

    Lightning's own callback stops the second run in a folder when no logger makes a folder per run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, before training, validation, test or prediction starts."""
        if self.already_saved:
            return
        self.already_saved = True
        folder = run_folder(trainer)  # on every rank: they agree on one
        if trainer.is_global_zero:
            self._write(folder, trainer)

    def _write(self, folder: Path, trainer: Trainer) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        header = [line for line in text.splitlines() if line.startswith("#")]
        config = redact(yaml.safe_load(text))
        folder.mkdir(parents=True, exist_ok=True)
        body = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        _unused(folder / self.config_filename).write_text("\n".join([*header, body]), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update({"cli": config}, allow_val_change=True)


def redact(value: Any, secret: bool = False) -> Any:
    """Return the same config with every text below a key such as ``api_key``, ``token`` or ``password`` replaced.

    Example:
        >>> redact({"wandb": {"api_key": "abc", "project": "dia"}})
        {'wandb': {'api_key': '***', 'project': 'dia'}}
    """
    if isinstance(value, dict):
        return {key: redact(item, secret or _SECRET.search(str(key)) is not None) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item, secret) for item in value]
    return "***" if secret and isinstance(value, str) else value


def _unused(path: Path) -> Path:
    """Return the path itself, or the first of ``config-v1.yaml``, ``config-v2.yaml``, ... as Lightning does."""
    candidate, version = path, 0
    while candidate.exists():
        version += 1
        candidate = path.with_name(f"{path.stem}-v{version}{path.suffix}")
    return candidate
