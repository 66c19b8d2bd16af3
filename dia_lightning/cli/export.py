"""The command ``export``: a network as a file that runs elsewhere, or a diffusion task as a folder for diffusers."""

import argparse
from collections.abc import Sequence

from dia_lightning.cli import _network_argument
from dia_lightning.cli._errors import UserError
from dia_lightning.models import Exported, export_network


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
    try:
        exported = _export(options)
    except OSError as error:
        raise UserError(f"{options.path} cannot be written ({error.strerror or error}). Give another path.") from error
    print(f"{exported.path}: largest difference to the network's own output {exported.difference:.1e}\n")
    print(exported.snippet)


def _export(options: argparse.Namespace) -> Exported:
    task = _network_argument.task_of(options)
    if task is not None:
        from dia_lightning.tasks import DiffusionTask, export_pipeline  # imports Lightning, which names do without

        if isinstance(task, DiffusionTask):
            return export_pipeline(task, options.path)
    network, images = _network_argument.network_and_images(options, batch=2, task=task)
    return export_network(network, images, options.path)
