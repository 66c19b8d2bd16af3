"""Everything an analysis of a network finds."""

from dataclasses import dataclass

from dia_lightning.analysis.correlation import Protocol, StageCorrelation
from dia_lightning.analysis.gates import StageGates
from dia_lightning.analysis.gradients import GradientFlow, RelativeChange
from dia_lightning.analysis.importance import StageImportance
from dia_lightning.analysis.recommendation import Recommendation


@dataclass(frozen=True)
class Analysis:
    """What the command ``analyze`` tabulates, plots and writes.

    Args:
        subject: what was analyzed, by name.
        notes: sentences on how to read these values for this task and network.
        correlations: per protocol and stage.
        gates: per stage.
        importance: per stage.
        recommendation: ``None`` for a network that already shares units between layers or uses ``plug``.
        gradients: of the loss, summed over the images of a batch.
        without_shortcuts: the same with the same weights but no shortcuts; ``None`` for networks that need theirs.
        change: of the features.
    """

    subject: dict[str, str | int]
    notes: list[str]
    correlations: dict[Protocol, list[StageCorrelation]]
    gates: list[StageGates]
    importance: list[StageImportance]
    recommendation: Recommendation | None
    gradients: GradientFlow
    without_shortcuts: GradientFlow | None
    change: RelativeChange
