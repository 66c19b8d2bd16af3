"""Weights & Biases for runs that must not end because of it."""

from dia_lightning._extras import require

require("lightning", by=__name__)

from dia_lightning.loggers.wandb import WandbLogger

__all__ = ["WandbLogger"]
