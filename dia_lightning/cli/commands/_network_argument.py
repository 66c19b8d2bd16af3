"""The network argument of ``check``, ``export`` and others: a name or a checkpoint."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dia_lightning.attention import attach
from dia_lightning.cli.commands import _checkpoint_argument
from dia_lightning.cli.parsing.own_classes import import_attention
from dia_lightning.cli.runs.task_of_run import task_of_run
from dia_lightning.models import get_model, list_models

if TYPE_CHECKING:  # imports Lightning, which --help does without
    from dia_lightning.tasks import DIATask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the network."""
    parser.add_argument(
        "network", help="a name such as torchvision/resnet50, a checkpoint file, or 'last' or 'best' for a run's"
    )
    parser.add_argument("--attention", default="dia-lstm", help="for a name: what to attach (default: dia-lstm)")
    parser.add_argument("--share", default="stage", choices=("stage", "block"), help="for a name (default: stage)")
    parser.add_argument("--runs", default="runs", help="folder to search for 'last' and 'best' (default: runs)")
    parser.add_argument("--image_size", type=int, help="height and width (default: the checkpoint's, 32 or 224)")


def task_of(options: argparse.Namespace) -> "DIATask | None":
    """Return the task of the checkpoint that the options name, or ``None`` if they name a network.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    name: str = options.network
    is_file = name.startswith((".", "/")) or Path(name).exists()
    if name not in ("last", "best") and Path(name).suffix != ".ckpt" and (not is_file or name in list_models(name)):
        return None
    return task_of_run(_checkpoint_argument.resolved(name, options.runs))


def network_and_images(
    options: argparse.Namespace, batch: int, task: "DIATask | None" = None
) -> tuple[nn.Module, Tensor]:
    """Return the network that the options name, in evaluation mode, and random images ``[batch, C, H, W]`` for it.

    Args:
        options: the arguments of the command.
        batch: number of images.
        task: the task of the checkpoint, if already loaded.

    Raises:
        ValueError: if there is no such network or checkpoint.
    """
    torch.manual_seed(0)
    name: str = options.network
    shape = [3, *[224 if "/" in name else 32] * 2]
    task = task_of(options) if task is None else task
    if task is None:
        import_attention(options.attention, "--attention")
        network = attach(get_model(name), options.attention, share=options.share)
    else:
        from dia_lightning.tasks import ClassificationTask

        if not isinstance(task, ClassificationTask):
            raise ValueError(f"{name} must hold a ClassificationTask, but holds a {type(task).__name__}.")
        network, shape = task.backbone, task.image_shape or shape
    size = shape[1:] if options.image_size is None else [options.image_size] * 2
    return network.eval(), torch.rand(batch, shape[0], *size)
