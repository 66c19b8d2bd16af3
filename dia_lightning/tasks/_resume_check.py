"""What a training must have in common with the checkpoint it resumes from, besides the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from dia_lightning._checkpoint_kind import WrongCheckpointError

#: Key of the classes of optimizers and schedules in a checkpoint.
RECORD = "dia_training"


@dataclass(frozen=True)
class ResumedTraining:
    """The optimizers and schedules of a checkpoint.

    Args:
        source: the file, for messages.
        states: of the optimizers.
        schedules: states of the schedules.
        classes: of both, by ``"optimizers"`` and ``"schedules"``; empty in older checkpoints.
    """

    source: str
    states: Sequence[Any]
    schedules: Sequence[Any]
    classes: dict[str, Any]

    def check(self, trainer: Trainer) -> None:
        """Compare them with a trainer's, before Lightning loads the states.

        Raises:
            WrongCheckpointError: if they do not match.
        """
        self._check_classes("optimizer", self.states, trainer.optimizers)
        for state, optimizer in zip(self.states, trainer.optimizers, strict=True):
            self._check_groups(state, optimizer)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        if schedules:  # StochasticWeightAveraging removes them once it has begun
            self._check_classes("schedule", self.schedules, schedules)

    def _check_classes(self, what: str, states: Sequence[Any], present: Sequence[Any]) -> None:
        if not all(isinstance(state, dict) for state in states):
            self._refuse(f"the state of its {what} is damaged")
        before, now = self.classes.get(f"{what}s"), [type(each).__name__ for each in present]
        if len(states) != len(present):
            self._refuse(f"it has the state of {len(states)} {what}s, and the options make {len(now)}")
        if isinstance(before, list) and before != now:
            found = ", ".join(map(str, before))
            self._refuse(f"it has the state of {found} as {what}, and the options make {', '.join(now)}")

    def _check_groups(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        found, name = state.get("param_groups"), type(optimizer).__name__
        groups: list[Any] = found if isinstance(found, list) and isinstance(state.get("state"), dict) else []
        if not groups or not all(isinstance(each, dict) and isinstance(each.get("params"), list) for each in groups):
            self._refuse("the state of its optimizer is damaged")
        sizes, present = ([len(each["params"]) for each in of] for of in (groups, optimizer.param_groups))
        if sizes != present:
            self._refuse(
                f"its optimizer trains {_listed(sizes)} parameters, and that of the options {_listed(present)} "
                "(freeze, layer_decay, a finetuning callback)"
            )
        # a newer torch may add an option to an optimizer, but does not rename one
        missing, strange = set(optimizer.defaults) - set(groups[0]), set(groups[0]) - set(optimizer.param_groups[0])
        if missing and strange:
            self._refuse(
                f"its optimizer has {', '.join(sorted(strange))}, which the {name} of the options does not know"
            )

    def _refuse(self, reason: str) -> None:
        raise WrongCheckpointError(
            f"{self.source} is not a checkpoint that this training can resume from: {reason}. Use the options it was "
            "trained with, or start anew from its weights alone, with init_from instead of ckpt_path."
        )


def classes_in_use(trainer: Trainer) -> dict[str, list[str]]:
    """Return the classes of a trainer's optimizers and schedules, for its checkpoints."""
    return {
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "schedules": [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs],
    }


def leave_out_finders(trainer: Trainer) -> None:
    """Keep finders from searching again when a training resumes."""
    if trainer.ckpt_path is None:  # a finder restores the state before its trial steps
        return
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for finder in [each for each in callbacks if type(each) is LearningRateFinder]:
        callbacks.remove(finder)
        rank_zero_warn(
            "LearningRateFinder is skipped: a resumed training keeps the learning rate it began with. Start anew, "
            "with init_from instead of ckpt_path, to search for another one."
        )
    if any(type(each) is BatchSizeFinder for each in callbacks):
        rank_zero_warn(
            "BatchSizeFinder searches for a batch size again, after which the training differs from an uninterrupted "
            "one. Omit it, and give the batch size that it found."
        )


def _listed(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{len(sizes)} groups of {', '.join(map(str, sizes[:5]))}"
