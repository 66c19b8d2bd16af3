"""Groups of parameters that an optimizer treats differently."""

import math
from collections.abc import Sequence, Set
from typing import Any, TypeAlias

from torch import nn

from dia_lightning.tasks._layers import layers

#: Options of a task that its groups depend on, and their values in checkpoints that lack them.
GROUPING = {"attention_lr": 1.0, "layer_decay": 1.0, "norm_weight_decay": True, "freeze": None}

#: Group and options of each parameter, by name.
Plan: TypeAlias = dict[str, dict[str, Any]]


def check_grouping(attention_lr: float, layer_decay: float) -> None:
    """Check the values when a task is created, long before they are used.

    Raises:
        ValueError: if a number is out of its range.
    """
    if not (math.isfinite(attention_lr) and attention_lr >= 0):
        raise ValueError(f"attention_lr must be 0 or a positive factor of lr, got {attention_lr}.")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}. 0.75 is usual; 1 is none.")


def plan_groups(
    module: nn.Module,
    network: nn.Module,
    attention: Set[nn.Parameter],
    *,
    attention_lr: float,
    layer_decay: float,
    norm_weight_decay: bool,
) -> Plan:
    """Return which group each parameter of a module belongs to, by the parameter's name.

    Args:
        module: the module to train. Sharded parameters have lost their shapes.
        network: the part of it whose layers have smaller learning rates; layers outside it are the head.
        attention: parameters of attention, which form their own group.
        attention_lr: factor of their learning rate.
        layer_decay: factor from each layer to the one before.
        norm_weight_decay: whether norms and biases have weight decay.
    """
    parts: dict[nn.Parameter, tuple[str, float]] = {}
    if layer_decay != 1:
        inside = layers(network, attention)
        counted = set(attention).union(*inside)
        has_head = any(parameter not in counted for parameter in module.parameters())
        parts |= _decayed(inside, layer_decay, steps_to_last=1 if has_head else 0)
    if attention_lr != 1 or layer_decay != 1:
        parts |= dict.fromkeys(attention, ("attention", attention_lr))
    without_decay = set() if norm_weight_decay else _norms_and_biases(module)
    plan: Plan = {}
    for name, parameter in module.named_parameters():
        part, scale = parts.get(parameter, ("main", 1.0))
        options: dict[str, Any] = {"lr_scale": scale}
        if parameter in without_decay:
            part, options = f"{part}/no_decay", {**options, "weight_decay": 0.0}
        plan[_without_wrappers(name)] = {"name": part, **options}
    return plan


def fits(plan: Plan, module: nn.Module) -> bool:
    """Return whether a plan covers the parameters of a module, sharded or not."""
    return plan.keys() == {_without_wrappers(name) for name, _ in module.named_parameters()}


def parameter_groups(module: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Return the trainable parameters of a module, in groups for an optimizer.

    Each group has a ``name``, its learning-rate factor ``lr_scale``, and ``weight_decay=0`` if it has no decay. If all
    parameters are treated alike, there is one group without any of these.

    Args:
        module: the module to train.
        plan: of its groups.

    Raises:
        ValueError: if there is nothing to train.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            options = plan[_without_wrappers(name)]
            groups.setdefault(options["name"], {"params": [], **options})["params"].append(parameter)
    if not any(group["lr_scale"] > 0 for group in groups.values()):
        raise ValueError(
            "Every parameter is frozen or has a learning rate of 0, so nothing would be trained. Freeze less "
            "(freeze, trainable_layers, attention_lr, a finetuning callback)."
        )
    ordered = sorted(groups.values(), key=lambda group: group["name"].startswith("attention"))
    return ordered if set(groups) != {"main"} else [{"params": groups["main"]["params"]}]


def _without_wrappers(name: str) -> str:
    """Return a name without the parts added by ``FullyShardedDataParallel`` and its checkpointing."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def _decayed(
    found: Sequence[Sequence[nn.Parameter]], decay: float, steps_to_last: int
) -> dict[nn.Parameter, tuple[str, float]]:
    top = len(found) - 1 + steps_to_last
    return {
        parameter: (f"layer_{number}", decay ** (top - number))
        for number, layer in enumerate(found)
        for parameter in layer
    }


def _norms_and_biases(module: nn.Module) -> set[nn.Parameter]:
    """Return parameters that only shift or scale: biases, those of norms, and all one-dimensional ones."""
    return {
        parameter
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.ndim < 2 or name == "bias" or "Norm" in type(part).__name__
    }
