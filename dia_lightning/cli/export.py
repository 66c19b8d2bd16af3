"""The command ``export``: a network as a file that runs elsewhere, or a diffusion task as a folder for diffusers."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dia_lightning.cli import _network_argument
from dia_lightning.cli._errors import UserError
from dia_lightning.models import Exported, export_network

if TYPE_CHECKING:  # imports Lightning
    from dia_lightning.tasks import DIATask


def run(args: Sequence[str]) -> None:
    """Write the file or folder, compare outputs, and print how to load it.

    Args:
        args: arguments of the command, without its name.
    """
    parser = argparse.ArgumentParser(
        "dia-lightning export", description="Write a network to a file that runs elsewhere."
    )
    _network_argument.add_arguments(parser)
    parser.add_argument(
        "path",
        help="where to: NAME.onnx, NAME.pt2 (torch.export) or NAME.safetensors (weights only); for a diffusion task a "
        "new folder, which becomes a pipeline of diffusers",
    )
    options = parser.parse_args(args)
    task = _network_argument.task_of(options)
    export = _pipeline(task, options) if _is_diffusion(task) else _file(task, options)
    try:
        exported = export()
    except OSError as error:
        raise UserError(f"{options.path} cannot be written ({error.strerror or error}). Give another path.") from error
    print(f"{exported.path}: largest difference to the network's own output {exported.difference:.1e}\n")
    print(exported.snippet)


def _is_diffusion(task: "DIATask | None") -> bool:
    if task is None:
        return False
    from dia_lightning.tasks import DiffusionTask  # imports Lightning, which names do without

    return isinstance(task, DiffusionTask)


def _pipeline(task: Any, options: argparse.Namespace) -> Callable[[], Exported]:
    from dia_lightning.tasks import export_pipeline

    if options.image_size is not None:
        raise ValueError(
            f"--image_size {options.image_size}: a diffusion task makes images of the size that it was trained with, "
            f"{task.shape[1]}x{task.shape[2]}. Leave it out."
        )
    return partial(export_pipeline, task, options.path)


def _file(task: "DIATask | None", options: argparse.Namespace) -> Callable[[], Exported]:
    network, images = _network_argument.network_and_images(options, batch=2, task=task)
    return partial(export_network, network, images, options.path)
