"""Callbacks for pictures, averaged weights, predictions and attention maps."""

from dia_lightning._extras import require

require("lightning", "matplotlib", "torchmetrics", by=__name__)

from dia_lightning.callbacks._run_folder import run_folder
from dia_lightning.callbacks.checkpoint_io import SafeCheckpointIO
from dia_lightning.callbacks.confusion_matrix import ConfusionMatrix
from dia_lightning.callbacks.detection_grid import DetectionGrid
from dia_lightning.callbacks.detection_writer import DetectionWriter
from dia_lightning.callbacks.ema import EMA
from dia_lightning.callbacks.generated_grid import GeneratedGrid
from dia_lightning.callbacks.generation_scores import GenerationScores
from dia_lightning.callbacks.map_correlation import MapCorrelation
from dia_lightning.callbacks.prediction_grid import PredictionGrid
from dia_lightning.callbacks.prediction_table import PredictionTable
from dia_lightning.callbacks.prediction_writer import PredictionWriter
from dia_lightning.callbacks.run_summary import RunSummary
from dia_lightning.callbacks.stage_gradients import StageGradients

__all__ = [
    "EMA",
    "ConfusionMatrix",
    "DetectionGrid",
    "DetectionWriter",
    "GeneratedGrid",
    "GenerationScores",
    "MapCorrelation",
    "PredictionGrid",
    "PredictionTable",
    "PredictionWriter",
    "RunSummary",
    "SafeCheckpointIO",
    "StageGradients",
    "run_folder",
]
