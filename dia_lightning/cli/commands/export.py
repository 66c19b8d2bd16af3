"""The command ``export``: a network as a file that runs elsewhere, or a diffusion task as a folder for diffusers."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dia_lightning.cli._errors import PROGRAM, UserError
from dia_lightning.cli.commands import _network_argument
from dia_lightning.cli.commands._exported_metadata import metadata_of
from dia_lightning.cli.runs.find_checkpoint import find_checkpoint
from dia_lightning.cli.runs.run_of_checkpoint import config_of
from dia_lightning.models import Exported, ExportedDetector, export_detector, export_network

if TYPE_CHECKING:  # imports Lightning
    from dia_lightning.tasks import DIATask

    Written: TypeAlias = Exported | ExportedDetector

#: Number of images on which a detector and its file are compared.
COMPARED_IMAGES = 8


def run(args: Sequence[str]) -> None:
    """Write the file or folder, compare outputs, and print how to load it.

    Args:
        args: arguments of the command, without its name.
    """
    options = _parser().parse_args(args)
    _check(options)
    task = _network_argument.task_of(options)
    is_diffusion, is_detector = _is(task, "DiffusionTask"), _is(task, "DetectionTask")
    _refuse_unused(options, task, is_diffusion=is_diffusion, is_detector=is_detector)
    batches = _batches(task, options) if task and (is_detector or options.fold_constant_maps is not None) else []
    if task and options.fold_constant_maps is not None:
        from dia_lightning.cli.commands._fold_constant_maps import folded

        folded(task, batches, options)
    export = (_pipeline if is_diffusion else _detector if is_detector else _file)(task, options, batches)
    try:
        exported = export()
    except OSError as error:
        raise UserError(f"{options.path} cannot be written ({error.strerror or error}). Give another path.") from error
    print(f"{exported.path}: {exported.agreement}\n")
    print(exported.snippet)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dia-lightning export", description="Write a network to a file that runs elsewhere."
    )
    _network_argument.add_arguments(parser)
    add = parser.add_argument
    add(
        "path",
        help="where to: NAME.onnx, NAME.pt2 (torch.export, not for detectors) or NAME.safetensors (weights only); for "
        "a diffusion task a new folder, which becomes a pipeline of diffusers",
    )
    add(
        *("--fold-constant-maps", "--fold_constant_maps"),
        type=float,
        metavar="TOLERANCE",
        help="fold attention maps whose deviation between images, relative to their mean, is at most this value into "
        "the weights, and remove their attention, for example 0.01; 0 for maps that are always the same",
    )
    add("-c", "--config", help="config whose data to use for that, and to compare a detector on (default: the run's)")
    add("--root", help="folder of the data (default: that of the config)")
    add("--split", default="val", choices=("train", "val", "test"), help="which part of the data (default: val)")
    add("--images", type=int, default=256, help="number of images to measure maps on (default: 256)")
    return parser


def _check(options: argparse.Namespace) -> None:
    tolerance = options.fold_constant_maps
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(
            f"--fold-constant-maps must be in [0, 1), the deviation of a map over its mean, for example 0.01; got "
            f"{tolerance}."
        )
    if options.images < 2:
        raise ValueError(f"--images must be 2 or more, got {options.images}.")


def _refuse_unused(
    options: argparse.Namespace, task: "DIATask | None", *, is_diffusion: bool, is_detector: bool
) -> None:
    folds = options.fold_constant_maps is not None
    if folds and is_diffusion:
        raise ValueError(
            "--fold-constant-maps: the maps of a diffusion network depend on the timestep, and its folder is loaded "
            "with attention. Leave it out."
        )
    if folds and task is None:
        raise ValueError(
            f"--fold-constant-maps: {options.network} is not trained, and there are no data to measure its maps on. "
            "Give a checkpoint."
        )
    for name in ("config", "root"):
        if getattr(options, name) is not None and not (folds or is_detector):
            raise ValueError(f"--{name} is for --fold-constant-maps and for detectors. Leave it out.")
    if options.image_size is not None and is_detector:
        raise ValueError(
            f"--image_size {options.image_size}: the file of a detector takes images of any size and resizes them "
            "itself. Leave it out."
        )


def _is(task: "DIATask | None", name: str) -> bool:
    if task is None:
        return False
    from dia_lightning import tasks  # imports Lightning, which a name does not need

    return isinstance(task, getattr(tasks, name))


# ---- data


def _batches(task: "DIATask", options: argparse.Namespace) -> list[Any]:
    """Return batches of the data of a run; none for a detector that only lacks its data for the comparison."""
    from dia_lightning.cli.commands._task_and_data import data_module_of

    is_asked = options.fold_constant_maps is not None or options.config is not None or options.root is not None
    count = options.images if options.fold_constant_maps is not None else COMPARED_IMAGES
    checkpoint = Path(find_checkpoint(options.network, [Path(options.runs)], announce=False))
    config = Path(options.config or config_of(checkpoint))
    try:
        data = data_module_of(config, task, options.root, download=None if is_asked else False)
        return list(data.evaluation_dataloader(options.split, count=count))
    except (FileNotFoundError, ValueError) as error:
        if is_asked:
            raise
        sys.stderr.write(f"{PROGRAM}: compared on random images, in which there are no objects: {error}\n")
        return []


# ---- the file or folder


def _pipeline(task: Any, options: argparse.Namespace, batches: list[Any]) -> "Callable[[], Written]":
    from dia_lightning.tasks import export_pipeline

    if options.image_size is not None:
        raise ValueError(
            f"--image_size {options.image_size}: a diffusion task makes images of the size that it was trained with, "
            f"{task.shape[1]}x{task.shape[2]}. Leave it out."
        )
    return partial(export_pipeline, task, options.path)


def _detector(task: Any, options: argparse.Namespace, batches: list[Any]) -> "Callable[[], Written]":
    images: list[Tensor] = [image for batch in batches for image in batch[0]][:COMPARED_IMAGES]
    generator = torch.Generator().manual_seed(0)
    images = images or [torch.rand(3, *size, generator=generator) for size in ((320, 320), (240, 320))]
    metadata = metadata_of(task, images[0].shape)
    return partial(export_detector, task.detector, images, options.path, metadata=metadata)


def _file(task: "DIATask | None", options: argparse.Namespace, batches: list[Any]) -> "Callable[[], Written]":
    network, images = _network_argument.network_and_images(options, batch=2, task=task)
    return partial(export_network, network, images, options.path, metadata=metadata_of(task, images.shape[1:]))
