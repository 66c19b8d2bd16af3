"""What shared attention does: how maps of different layers agree, and what they are."""

from dia_lightning.analysis.correlation import StageCorrelation, map_correlation, mean_correlation
from dia_lightning.analysis.recorder import MapRecorder, RecordedStage

__all__ = ["MapRecorder", "RecordedStage", "StageCorrelation", "map_correlation", "mean_correlation"]
