"""What shared attention does: how well maps of layers agree, which values they take, and its effect on gradients."""

from dia_lightning._extras import require

require("matplotlib", by=__name__)

from dia_lightning.analysis.correlation import (
    Protocol,
    StageCorrelation,
    map_correlation,
    mean_correlation,
    mean_interval,
)
from dia_lightning.analysis.folding import FoldedSite, FoldReport, fold_constant_maps
from dia_lightning.analysis.gates import StageGates, gate_statistics
from dia_lightning.analysis.gradients import (
    GradientFlow,
    RelativeChange,
    gradient_flow,
    relative_change,
    without_shortcuts,
)
from dia_lightning.analysis.importance import StageImportance, map_importance
from dia_lightning.analysis.pictures import (
    draw_correlation,
    draw_gates,
    draw_gradients,
    draw_importance,
    draw_relative_change,
)
from dia_lightning.analysis.recommendation import Recommendation, recommend
from dia_lightning.analysis.recorder import MapRecorder, RecordedStage
from dia_lightning.drawing import draw_stage_gradients

__all__ = [
    "FoldReport",
    "FoldedSite",
    "GradientFlow",
    "MapRecorder",
    "Protocol",
    "Recommendation",
    "RecordedStage",
    "RelativeChange",
    "StageCorrelation",
    "StageGates",
    "StageImportance",
    "draw_correlation",
    "draw_gates",
    "draw_gradients",
    "draw_importance",
    "draw_relative_change",
    "draw_stage_gradients",
    "fold_constant_maps",
    "gate_statistics",
    "gradient_flow",
    "map_correlation",
    "map_importance",
    "mean_correlation",
    "mean_interval",
    "recommend",
    "relative_change",
    "without_shortcuts",
]
