"""The command ``analyze``: what the attention of a network does, as tables and figures."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from dia_lightning.cli.commands import _checkpoint_argument
from dia_lightning.cli.runs.run_of_checkpoint import config_of
from dia_lightning.cli.runs.task_of_run import task_of_run

if TYPE_CHECKING:  # imports Lightning, which --help does without
    from dia_lightning.analysis import GradientFlow, MapRecorder
    from dia_lightning.analysis.findings import Analysis
    from dia_lightning.datamodules import DIADataModule
    from dia_lightning.tasks import DIATask

KEPT_IMAGES = 1000  # whose maps the forests are fitted to
GRADIENT_IMAGES = 64

TIMESTEPS = (
    "The maps of a diffusion network depend on the timestep: every image is seen once, with the noise and the timestep "
    "that validation draws for it, so deviations and correlations are over images and timesteps together."
)
DETECTION = (
    "The loss is the sum of torchvision's losses with fixed draws of anchors and boxes, times the number of images; "
    "the network is the backbone of the detector."
)
NO_SHORTCUTS_TO_REMOVE = (
    "Gradients without shortcuts are not available for this network: no block of it has a shortcut that can be taken "
    "out (those of cifar_resnet and cifar_resnext can)."
)


def run(args: Sequence[str]) -> None:
    """Write the tables and figures, and print a summary and their folder.

    Args:
        args: arguments of the command, without its name.

    Raises:
        ValueError: if there is no such checkpoint, or an option does not fit it.
        ImportError: if a logger is not installed.
    """
    options = _parser().parse_args(args)
    _check(options)
    device = _checkpoint_argument.device_of(options)
    checkpoint = None if options.checkpoint is None else _checkpoint_argument.checkpoint_of(options)
    from dia_lightning.analysis import report
    from dia_lightning.cli.commands import _send_analysis

    _send_analysis.check_installed(options.log)
    task, data, config = _from_config(options) if checkpoint is None else _from_checkpoint(checkpoint, options)
    _check_attention(task, checkpoint or config)
    analysis = _analyze(task.to(device), data, options)
    place = Path(options.runs) / config.name if checkpoint is None else checkpoint
    folder = _checkpoint_argument.new_folder(options, place, "analysis")
    pictures = report.figures(analysis)
    report.write(analysis, pictures, folder, checkpoint=checkpoint, config=config)
    print(f"{report.summary(analysis)}\nreport.md, result.json and pictures: {folder}")
    _send_analysis.send(analysis, pictures, folder, options.log, report.origin(checkpoint, config))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dia-lightning analyze",
        description="Correlation between the attention maps of layers, which values maps take, which layers could "
        "share a unit, and how gradients flow back, with and without shortcuts. For all tasks.",
    )
    without = "the network is analyzed as the config builds it: at initialization, or with pretrained weights"
    _checkpoint_argument.add_arguments(parser, out="analysis", without=without)
    add = parser.add_argument
    add(
        *("-c", "--config"),
        action="append",
        default=[],
        help="config whose data to use (default: config.yaml of the run), or, without a checkpoint, to build all "
        "from; several are merged from left to right",
    )
    add("--root", help="folder of the data (default: that of the config)")
    add("--split", default="test", choices=("train", "val", "test"), help="which part of the data (default: test)")
    add("--images", type=int, default=1000, help="number of images, in class proportions (default: 1000)")
    add("--threshold", type=float, default=0.8, help="correlation of layers that could share a unit (default: 0.8)")
    add("--seed", type=int, default=0, help="seed of bootstrap and random forests (default: 0)")
    add(
        "--log",
        action="append",
        default=[],
        choices=("wandb", "tensorboard"),
        help="log the results there too; repeatable",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, value, least in (("images", options.images, 2), ("seed", options.seed, 0)):
        if value < least:
            raise ValueError(f"--{name} must be {least} or more, got {value}.")
    if not 0 < options.threshold <= 1:
        raise ValueError(f"--threshold must be above 0 and at most 1, got {options.threshold}.")
    if options.checkpoint is None and not options.config:
        raise ValueError("There is nothing to analyze: give a checkpoint ('best', 'last', a file) or -c CONFIG.")
    if options.checkpoint is not None and len(options.config) > 1:
        raise ValueError(
            f"-c {' -c '.join(options.config)}: with a checkpoint only the data of one config are used. Give the one "
            "with the data; loggers are chosen with --log."
        )
    _checkpoint_argument.check_out_is_new(options)


# ---- the network and its data


def _from_checkpoint(path: Path, options: argparse.Namespace) -> "tuple[DIATask, DIADataModule, Path]":
    from dia_lightning.cli.commands._task_and_data import data_module_of

    task = task_of_run(path)
    config = Path(*options.config) if options.config else config_of(path)
    return task, data_module_of(config, task, options.root), config


def _from_config(options: argparse.Namespace) -> "tuple[DIATask, DIADataModule, Path]":
    from dia_lightning.cli.commands._task_and_data import built_run

    return *built_run(options.config, options.root), Path(options.config[0])


def _check_attention(task: "DIATask", source: Path) -> None:
    from dia_lightning.attention import attention_layers

    try:
        attention_layers(task)
    except ValueError:
        raise ValueError(
            f"The network of {source} has no attention, so there is nothing to analyze. Take a run with attention, or "
            "a network with attention modules of its own."
        ) from None


# ---- results


def _analyze(task: "DIATask", data: "DIADataModule", options: argparse.Namespace) -> "Analysis":
    from dia_lightning import analysis
    from dia_lightning.analysis.findings import Analysis
    from dia_lightning.attention import is_attached

    network = task.network_body()
    # in class proportions: the first images of the data set may be of only a few classes
    batches = partial(data.evaluation_dataloader, options.split)
    recorder = _record(task, network, batches(count=options.images), keep=KEPT_IMAGES, seed=options.seed)
    kept = recorder
    if options.images > KEPT_IMAGES:
        kept = _record(task, network, batches(count=KEPT_IMAGES), keep=KEPT_IMAGES, replicates=0)
    size = batches().batch_size or 1
    first = _on_device(task, next(iter(batches(count=min(GRADIENT_IMAGES, size)))))
    loss = partial(task.evaluation_loss, first)
    stages = recorder.stages
    correlations = {protocol: analysis.map_correlation(stages, protocol) for protocol in get_args(analysis.Protocol)}
    without = _gradients_without_shortcuts(network, loss)
    is_own = not is_attached(network)  # then the network's own attention is analyzed
    advised = is_own or (task.hparams.get("share") == "block" and task.hparams.get("plug") is None)
    found = analysis.recommend(network, correlations["per-image"], threshold=options.threshold) if advised else None
    images = {"images": recorder.images, "gradient_images": len(first[0])}
    return Analysis(
        subject={**_subject(task, data), "split": options.split, **images, "seed": options.seed},
        notes=_notes(task, has_shortcuts=without is not None),
        correlations=correlations,
        gates=analysis.gate_statistics(stages),
        importance=analysis.map_importance(kept.stages, seed=options.seed),
        recommendation=found,
        gradients=analysis.gradient_flow(network, loss),
        without_shortcuts=without,
        change=analysis.relative_change(network, loss),
    )


def _subject(task: "DIATask", data: "DIADataModule") -> dict[str, str | int]:
    names = {"detector": "detector", "backbone": "network", "attention": "attention", "share": "share"}
    trained = {shown: str(task.hparams[name]) for name, shown in names.items() if name in task.hparams}
    return {"task": type(task).__name__, **trained, "data": type(data).__name__}


def _record(task: "DIATask", network: nn.Module, loader: Any, **options: Any) -> "MapRecorder":
    """Run the network on all batches."""
    from dia_lightning.analysis import MapRecorder

    with MapRecorder(network, **options) as recorder, torch.no_grad():
        for batch in tqdm(loader, desc="analyzing", unit="batch", disable=None):
            if not task.evaluation_loss(_on_device(task, batch)).isfinite():
                raise ValueError("The loss of the network is not finite: its weights or the images are broken.")
    return recorder


def _on_device(task: "DIATask", batch: Any) -> Any:
    return task.transfer_batch_to_device(batch, task.device, 0)


def _gradients_without_shortcuts(network: nn.Module, loss: "partial[Tensor]") -> "GradientFlow | None":
    from dia_lightning.analysis import gradient_flow, without_shortcuts

    if not any(getattr(module, "has_shortcut", False) for module in network.modules()):
        return None
    with without_shortcuts(network):
        return gradient_flow(network, loss)


def _notes(task: "DIATask", *, has_shortcuts: bool) -> list[str]:
    from dia_lightning.tasks import DetectionTask, DiffusionTask

    notes = [TIMESTEPS] if isinstance(task, DiffusionTask) else []
    notes += [DETECTION] if isinstance(task, DetectionTask) else []
    return notes if has_shortcuts else [*notes, NO_SHORTCUTS_TO_REMOVE]
