"""The command ``analyze``: what the attention of a trained classifier does, as tables and pictures."""

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from dia_lightning.cli import _checkpoint_argument

if TYPE_CHECKING:  # imports Lightning, which --help does without
    from pathlib import Path

    from dia_lightning.analysis import MapRecorder
    from dia_lightning.cli._analysis import Analysis
    from dia_lightning.datamodules import ClassificationDataModule
    from dia_lightning.tasks import ClassificationTask

KEPT_IMAGES = 1000  # whose maps forests are fitted on
GRADIENT_IMAGES = 64


def run(args: Sequence[str]) -> None:
    """Write the tables and pictures, and print a summary and where they are.

    Args:
        args: arguments of the command, without its name.

    Raises:
        ValueError: if there is no such checkpoint, or an option does not fit it.
    """
    options = _parser().parse_args(args)
    for name, value, least in (("images", options.images, 2), ("seed", options.seed, 0)):
        if value < least:
            raise ValueError(f"--{name} must be {least} or more, got {value}.")
    if not 0 < options.threshold <= 1:
        raise ValueError(f"--threshold must be above 0 and at most 1, got {options.threshold}.")
    checkpoint = _checkpoint_argument.checkpoint_of(options)
    device = _checkpoint_argument.device_of(options)
    from dia_lightning.cli import _analysis
    from dia_lightning.cli._run_data import check_fits, data_module_of

    task = _load(checkpoint)
    config = options.config or _checkpoint_argument.run_folder_of(checkpoint) / "config.yaml"
    data = data_module_of(config, options.root)
    check_fits(task, data)
    analysis = _analyze(task.to(device), data, options)
    folder = _checkpoint_argument.new_folder(options, checkpoint, "analysis")
    _analysis.write(analysis, folder, str(checkpoint))
    print(f"{_analysis.summary(analysis)}\nreport.md, result.json and pictures: {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dia-lightning analyze",
        description="Correlation between the attention maps of layers, what values maps take, which layers could share "
        "a unit, and how gradients come back.",
    )
    _checkpoint_argument.add_arguments(parser, out="analysis")
    add = parser.add_argument
    add("-c", "--config", help="config whose data to use (default: config.yaml of the run)")
    add("--root", help="folder of the data (default: that of the config)")
    add("--split", default="test", choices=("train", "val", "test"), help="which part of the data (default: test)")
    add("--images", type=int, default=1000, help="how many, in the shares of the classes (default: 1000)")
    add("--threshold", type=float, default=0.8, help="correlation of layers that could share a unit (default: 0.8)")
    add("--seed", type=int, default=0, help="of bootstrap and random forests (default: 0)")
    return parser


def _load(path: "Path") -> "ClassificationTask":
    from dia_lightning.attention import attention_layers
    from dia_lightning.tasks import ClassificationTask, load_task

    task = load_task(path)
    if not isinstance(task, ClassificationTask):
        raise ValueError(f"{path} must hold a ClassificationTask, but holds a {type(task).__name__}.")
    try:
        attention_layers(task.backbone)
    except ValueError:
        raise ValueError(
            f"The network of {path} has no attention, so there is nothing to analyze. Take a run with attention."
        ) from None
    return task


def _analyze(task: "ClassificationTask", data: "ClassificationDataModule", options: argparse.Namespace) -> "Analysis":
    from dia_lightning import analysis
    from dia_lightning.cli._analysis import Analysis

    network = task.backbone
    loader = data.evaluation_dataloader(options.split, count=options.images)
    with analysis.MapRecorder(network, keep=KEPT_IMAGES, seed=options.seed) as recorder:
        images, labels = _run_network(task, loader, recorder)
    stages = recorder.stages
    correlations = {protocol: analysis.map_correlation(stages, protocol) for protocol in get_args(analysis.Protocol)}
    has_plug = task.hparams.get("plug") is not None
    return Analysis(
        subject={
            "network": str(task.hparams["backbone"]),
            "attention": str(task.hparams["attention"]),
            "share": str(task.hparams["share"]),
            "data": type(data).__name__,
            "split": options.split,
            "images": recorder.images,
            "seed": options.seed,
        },
        correlations=correlations,
        gates=analysis.gate_statistics(stages),
        importance=analysis.map_importance(stages, seed=options.seed),
        recommendation=None
        if has_plug
        else analysis.recommend(network, correlations["per-image"], threshold=options.threshold),
        gradients=analysis.gradient_flow(
            network, images, lambda logits: F.cross_entropy(logits, labels, reduction="sum")
        ),
        change=analysis.relative_change(network, images),
    )


def _run_network(
    task: "ClassificationTask", loader: Iterable[list[Tensor]], recorder: "MapRecorder"
) -> tuple[Tensor, Tensor]:
    """Run the network on all batches, and return the first images and labels."""
    first: tuple[Tensor, Tensor] | None = None
    for images, labels, _ in tqdm(loader, desc="analyzing", unit="batch", disable=None):
        images = images.to(task.device)
        with torch.no_grad():
            logits = task.backbone(images)
        if not logits.isfinite().all():
            raise ValueError("The outputs of the network are not finite: it diverged in training. Take another run.")
        if first is None:
            first = images[:GRADIENT_IMAGES], labels[:GRADIENT_IMAGES].to(task.device)
    assert first is not None
    return first
