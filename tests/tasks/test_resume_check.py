"""A training goes on only from a checkpoint whose optimizer and schedule it has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning

from dia_lightning._checkpoint_kind import WrongCheckpointError
from dia_lightning.tasks._resume_check import RECORD
from tests.tasks.tiny_training import fit, loader, tiny_task

SGD: dict[str, Any] = {}
ADAMW: dict[str, Any] = {"optimizer": "adamw"}
ADAM: dict[str, Any] = {"optimizer": torch.optim.Adam}
FEWER: dict[str, Any] = {"freeze": ["backbone.stem"]}
EXPONENTIAL: dict[str, Any] = {"schedule": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}
COSINE: dict[str, Any] = {"schedule": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)}


QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def trained(
    options: dict[str, Any],
    path: Path,
    change: Callable[[dict[str, Any]], object] = lambda found: None,
    **of_trainer: Any,
) -> Path:
    """Trains for a step, and returns the checkpoint, changed."""
    trainer = Trainer(
        **QUIET, accelerator="cpu", limit_train_batches=1, num_sanity_val_steps=0, **{"max_epochs": 1, **of_trainer}
    )
    trainer.fit(tiny_task(**options), loader(), loader(1))
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def without_record(content: dict[str, Any]) -> None:
    del content[RECORD]  # as before version 0.2
    content["hyper_parameters"]["freeze"] = None


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (SGD, ADAMW, "the state of SGD as optimizer, and the options make AdamW"),
        (ADAMW, SGD, "the state of AdamW as optimizer, and the options make SGD"),
        (ADAM, ADAMW, "the state of Adam as optimizer, and the options make AdamW"),
        (SGD, FEWER, "with freeze=None, but the task has"),
        (SGD, {"warmup_steps": 2}, "the state of 1 schedules, and the options make 2"),
        (SGD, EXPONENTIAL, "the state of NamedSchedule as schedule, and the options make ExponentialLR"),
        (EXPONENTIAL, SGD, "the state of ExponentialLR as schedule, and the options make NamedSchedule"),
        (EXPONENTIAL, COSINE, "the state of ExponentialLR as schedule, and the options make CosineAnnealingLR"),
    ],
)
def test_another_optimizer_or_schedule_is_refused(before: Any, now: Any, message: str, tmp_path: Path) -> None:
    path = trained(before, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message) as raised:
        fit(tiny_task(**now), ckpt_path=path, max_epochs=2)
    assert "\n" not in str(raised.value)
    assert "init_from" in str(raised.value)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (SGD, ADAMW, "has dampening, momentum, nesterov, which the AdamW of the options does not know"),
        (ADAMW, SGD, "has .*betas, .*, which the SGD of the options does not know"),
        (FEWER, SGD, "trains 10 parameters, and that of the options 12"),
    ],
)
def test_so_it_is_for_a_checkpoint_that_does_not_name_them(before: Any, now: Any, message: str, tmp_path: Path) -> None:
    path = trained(before, tmp_path / "x.ckpt", without_record)
    with pytest.raises(WrongCheckpointError, match=rf"x\.ckpt is not a checkpoint .*{message}"):
        fit(tiny_task(**now), ckpt_path=path, max_epochs=2)


@pytest.mark.parametrize("states", [[], ["x"], [{}], [{"state": {}, "param_groups": [1]}], [{"state": {}}] * 2])
def test_a_damaged_state_of_the_optimizer_is_refused(states: list[Any], tmp_path: Path) -> None:
    path = trained(SGD, tmp_path / "x.ckpt", lambda content: content.update(optimizer_states=states))
    with pytest.raises(WrongCheckpointError, match=r"is damaged|has the state of \d optimizers"):
        fit(tiny_task(), ckpt_path=path, max_epochs=2)


@pytest.mark.parametrize("options", [SGD, ADAMW, EXPONENTIAL, {**FEWER, "warmup_steps": 3}, {"attention_lr": 1.0}])
@pytest.mark.parametrize("change", [lambda content: None, lambda content: content.pop(RECORD)])
def test_a_training_goes_on_with_the_same_options(options: Any, change: Any, tmp_path: Path) -> None:
    path = trained(options, tmp_path / "x.ckpt", change)
    assert len(fit(tiny_task(**options), ckpt_path=path, max_epochs=2).seen) == 4


def test_a_training_goes_on_in_which_a_callback_adds_groups(tmp_path: Path) -> None:
    path = trained(SGD, tmp_path / "x.ckpt", callbacks=[BackboneFinetuning(1)], max_epochs=2)
    assert len(torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]) == 2
    assert fit(tiny_task(), callbacks=[BackboneFinetuning(1)], ckpt_path=path, max_epochs=3).seen
