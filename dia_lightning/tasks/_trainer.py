"""The trainer of a module that may have none."""

from lightning.pytorch import LightningModule, Trainer


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer that a module is attached to; ``None`` without one, or with Fabric."""
    try:
        trainer = module.trainer
    except RuntimeError:  # raised by Lightning if there is none
        return None
    return trainer if isinstance(trainer, Trainer) else None
