"""Pictures of arrays: images with a model's predictions, and figures of metrics."""

from dia_lightning._extras import require

require("matplotlib", by=__name__)

from dia_lightning.drawing._boxes_and_masks import draw_objects
from dia_lightning.drawing._confusion import draw_class_accuracy, draw_confusion_matrix
from dia_lightning.drawing._curves import Curve, draw_curves, draw_map_values
from dia_lightning.drawing._detections import Scene, draw_detections
from dia_lightning.drawing._heat_maps import HeatMap, draw_heat_maps, short_number
from dia_lightning.drawing._histograms import draw_stage_gradients
from dia_lightning.drawing._image_table import draw_table
from dia_lightning.drawing._letters import shorten
from dia_lightning.drawing._objects import ObjectClasses, Objects
from dia_lightning.drawing._pixels import as_image
from dia_lightning.drawing._predictions import Prediction, draw_predictions

__all__ = [
    "Curve",
    "HeatMap",
    "ObjectClasses",
    "Objects",
    "Prediction",
    "Scene",
    "as_image",
    "draw_class_accuracy",
    "draw_confusion_matrix",
    "draw_curves",
    "draw_detections",
    "draw_heat_maps",
    "draw_map_values",
    "draw_objects",
    "draw_predictions",
    "draw_stage_gradients",
    "draw_table",
    "short_number",
    "shorten",
]
