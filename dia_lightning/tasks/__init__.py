"""Tasks: LightningModules that train a backbone, with or without attention."""

from dia_lightning._extras import require

require("lightning", "torchmetrics", "tqdm", by=__name__)

from dia_lightning.tasks._finite import NonFiniteLossError
from dia_lightning.tasks._noise_schedule import Sampler
from dia_lightning.tasks._pipeline_export import export_pipeline
from dia_lightning.tasks.attention_options import AttentionOptions
from dia_lightning.tasks.base import DIATask
from dia_lightning.tasks.checkpoints import load_task
from dia_lightning.tasks.classification import ClassificationTask
from dia_lightning.tasks.detection import DetectionTask
from dia_lightning.tasks.diffusion import DiffusionTask
from dia_lightning.tasks.ensemble import EnsembleTask
from dia_lightning.tasks.optimization_options import OptimizationOptions
from dia_lightning.tasks.options import TaskOptions

__all__ = [
    "AttentionOptions",
    "ClassificationTask",
    "DIATask",
    "DetectionTask",
    "DiffusionTask",
    "EnsembleTask",
    "NonFiniteLossError",
    "OptimizationOptions",
    "Sampler",
    "TaskOptions",
    "export_pipeline",
    "load_task",
]
