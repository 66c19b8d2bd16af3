"""The command ``sites``: where attention goes in a network, what it adds, and what is left out."""

import argparse
import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from dia_lightning.attention import Branch, Stages, attach, detach, find_sites, is_attached
from dia_lightning.attention.inspection import attached_stages
from dia_lightning.cli.commands import _network_argument
from dia_lightning.cli.parsing.own_classes import import_attention
from dia_lightning.models import build_on_meta, get_model

if TYPE_CHECKING:  # imports Lightning, which --help does without
    from dia_lightning.tasks import DIATask


def run(args: Sequence[str]) -> None:
    """Print the table.

    Args:
        args: arguments of the command, without its name.

    Raises:
        ValueError: if there is no such network or checkpoint, or the network has no residual branch.
    """
    options = _parser().parse_args(args)
    network, example, title = _subject(options)
    plain = _plain(network)
    size = _count(plain)
    asked = (options.attention, options.share, options.reduction, options.branches)
    if plain is network or any(value is not None for value in asked):
        attention: str = options.attention or "dia-lstm"
        import_attention(attention, "--attention")
        share: Literal["stage", "block"] = options.share or "stage"
        found = find_sites(plain, example, branches=options.branches)
        network = plain
        arguments = {} if options.reduction is None else {"reduction": options.reduction}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about stages with a single block, which the table shows
            attach(network, attention, share=share, example=example, branches=options.branches, **arguments)
        told = f"{attention}, one per {share}, would add"
    else:
        found = _found(plain, example)
        told = "the attention that it has adds"
    stages, added = attached_stages(network, found)
    total = _count(network) - size
    print(f"{title}: {size:,} parameters; {told} {total:,} ({total / max(1, size):+.1%})\n")
    print(stages.table([("parameters", [f"{number:,}" for number in added])]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dia-lightning sites",
        description="Stages, blocks and layers of a network that attention goes to, the parameters that it adds to "
        "each stage, and the additions that are left out, with the reason. The network is run once on tensors without "
        "data. A network that has attention is shown with it, unless --attention, --share, --reduction or --branches "
        "ask for something else instead.",
    )
    add = parser.add_argument
    add(
        "network",
        nargs="?",
        help="a name such as timm/vit_small_patch16_224, a checkpoint file, or 'last' or 'best' for a run's",
    )
    add("-c", "--config", action="append", default=[], help="build the network from this config instead; repeatable")
    add("--root", help="with -c: folder of the data (default: that of the config)")
    add("--attention", help="(default: dia-lstm)")
    add("--share", choices=("stage", "block"), help="(default: stage)")
    add("--reduction", type=int, help="reduction of the attention (default: its own)")
    add("--branches", nargs="+", choices=get_args(Branch), help="which branches (default: as attach() chooses)")
    add("--image_size", type=int, help="height and width (default: what the network is made for)")
    add("--runs", default="runs", help="folder to search for 'last' and 'best' (default: runs)")
    return parser


def _subject(options: argparse.Namespace) -> tuple[nn.Module, Any, str]:
    """Return the network, an example input if it needs one, and its name for the title."""
    name = options.network
    if (name is None) == (not options.config):
        raise ValueError("Give either a network (a name, a checkpoint, 'last', 'best') or -c CONFIG.")
    task = _built(options) if name is None else _network_argument.task_of(options)
    if task is None:
        size = options.image_size or (None if "/" in name else 32)
        shape = None if size is None else [3, size, size]
        network = build_on_meta(partial(get_model, name))
    else:
        network, shape = task.network_body(), _shape(task, options.image_size)
    example = None if shape is None else torch.empty(2, *shape, device="meta")
    return network, example, name or " ".join(options.config)


def _built(options: argparse.Namespace) -> "DIATask":
    from dia_lightning.cli.commands._task_and_data import built_run

    return built_run(options.config, options.root)[0]


def _shape(task: "DIATask", image_size: int | None) -> list[int] | None:
    from dia_lightning.tasks import DiffusionTask

    shape: list[int] | None = getattr(task, "image_shape", None) or task.hparams.get("image_shape")
    if isinstance(task, DiffusionTask):
        if image_size is not None:
            raise ValueError(f"--image_size {image_size}: a diffusion network is made for images of one size.")
        return None  # it takes more than images
    if image_size is None:
        return shape
    return [shape[0] if shape else 3, image_size, image_size]


def _plain(network: nn.Module) -> nn.Module:
    """Return a network, or a copy without its attention."""
    return detach(copy.deepcopy(network)) if is_attached(network) else network


def _found(plain: nn.Module, example: Any) -> Stages:
    try:
        return find_sites(plain, example, branches=get_args(Branch))
    except ValueError:  # attached by site names, to a network that does not run
        return Stages()


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
