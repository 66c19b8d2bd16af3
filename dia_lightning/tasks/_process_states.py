"""Training state that Lightning does not save: random states, metrics of an unfinished epoch, accumulated gradients."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchmetrics import Metric, MetricCollection

KEY = "dia_processes"  # of a checkpoint: one entry per process
_WHOLE_GRADIENTS = (DDPStrategy, SingleDeviceStrategy)  # other strategies shard the parameters


def save(trainer: Trainer, task: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the states of all processes to a checkpoint, in a form that loads with ``weights_only=True``.

    Every process must call it.
    """
    own = {
        "random": _random_states(trainer.strategy.root_device),
        "logged": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
        "metrics": {},
        "gradients": {},
    }
    epochs: Any = trainer.fit_loop.epoch_progress.current
    if epochs.processed < epochs.started:  # otherwise they are about to be reset
        own["metrics"] = {name: _metric_state(metric) for name, metric in _training_metrics(task)}
        if trainer.fit_loop._should_accumulate() and isinstance(trainer.strategy, _WHOLE_GRADIENTS):
            own["gradients"] = {name: p.grad.cpu() for name, p in task.named_parameters() if p.grad is not None}
    states: list[Any] = [own]
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        states = [None] * trainer.world_size
        torch.distributed.all_gather_object(states, own)
    checkpoint[KEY] = states


def restore(trainer: Trainer, task: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Restore the random state of this process at once: anything built later would otherwise draw different numbers.

    Returns:
        What is restored later: ``"logged"`` metrics and ``"gradients"``; empty if there is none.
    """
    states = checkpoint.get(KEY)
    if states is None:  # written by an older version
        return {}
    if len(states) != trainer.world_size:
        rank_zero_warn(
            f"The checkpoint was written by {len(states)} process(es), but {trainer.world_size} resume it: random "
            "numbers will differ from those of an uninterrupted run. Use the same number for the same result."
        )
    if trainer.global_rank >= len(states):
        return {}
    own = states[trainer.global_rank]
    _set_random_states(own["random"], trainer.strategy.root_device)
    for name, metric in _training_metrics(task):
        if name in own["metrics"]:
            _set_metric_state(metric, own["metrics"][name])
    return dict(own)


def _random_states(device: torch.device) -> dict[str, Any]:
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words), python_gauss],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"].cpu())
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def _training_metrics(task: nn.Module) -> Iterator[tuple[str, Metric]]:
    """Yield the metrics in attributes of a task whose names begin with ``train``."""
    for module in task.modules():
        if isinstance(module, MetricCollection):
            module.items()  # lets metrics that share a state see the latest
    for name, module in task.named_modules():
        if name.startswith("train") and isinstance(module, Metric):
            yield name, module


def _metric_state(metric: Metric) -> dict[str, Any]:
    # on the CPU: each process reads all states, and GPU tensors would open a context on every other process's GPU
    states = metric.metric_state.items()
    moved = {name: [each.cpu() for each in kept] if isinstance(kept, list) else kept.cpu() for name, kept in states}
    return {"updates": metric.update_count, **moved}


def _set_metric_state(metric: Metric, state: dict[str, Any]) -> None:
    metric._update_count = state["updates"]
    metric._computed = None
    for name in metric.metric_state:
        value = state[name]
        moved = [each.to(metric.device) for each in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, moved)
