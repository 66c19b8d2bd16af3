"""The command ``sample``: write images of a trained diffusion task as PNG files."""

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from dia_lightning._choices import nearest
from dia_lightning._whole_files import written_whole
from dia_lightning.cli._errors import UserError
from dia_lightning.cli.commands import _checkpoint_argument
from dia_lightning.cli.runs.task_of_run import task_of_run

if TYPE_CHECKING:  # imports Lightning, which --help does without
    from dia_lightning.tasks import DiffusionTask

GRID_IMAGES = 256  # more are hard to look at
MOST_COLUMNS = 20  # one per class
TRACED_IMAGES = 8


def run(args: Sequence[str]) -> None:
    """Write the images and their grid, and print their folder.

    Args:
        args: arguments of the command, without its name.

    Raises:
        ValueError: if there is no such checkpoint, or an option does not fit it.
    """
    options = _parser().parse_args(args)
    for name in ("count", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(options, name)}.")
    path = _checkpoint_argument.checkpoint_of(options)
    task = _load(path, _checkpoint_argument.device_of(options))
    folder = _sample(task, options, path)
    images = f"{options.count} image{'s' if options.count > 1 else ''}"
    print(f"{images}{', grid.png and trace.png' if options.trace else ' and grid.png'}: {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dia-lightning sample", description="Make images with a trained diffusion task.")
    _checkpoint_argument.add_arguments(parser, out="samples/seed=SEED")
    add = parser.add_argument
    add("--count", type=int, default=64, help="how many images (default: 64)")
    add(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="names or numbers of classes to cycle through, or 'none' for images of no class (default: all classes)",
    )
    add("--steps", type=int, default=25, help="number of network evaluations per image (default: 25)")
    add("--guidance", type=float, default=1.0, help="weight of the class; larger is more typical (default: 1.0, none)")
    add("--sampler", default="ddim", choices=("ddim", "ddpm", "dpm++"), help="(default: ddim)")
    add("--seed", type=int, default=0, help="the same seed gives the same images (default: 0)")
    add("--batch_size", type=int, default=64, help="images at a time; does not affect them (default: 64)")
    add("--trace", action="store_true", help="also draw how the first images emerge from the noise")
    return parser


def _load(path: Path, device: str) -> "DiffusionTask":
    from dia_lightning.tasks import DiffusionTask

    task = task_of_run(path)
    if not isinstance(task, DiffusionTask):
        raise ValueError(
            f"Images are made by a DiffusionTask, but {path} holds a {type(task).__name__}. Give another checkpoint, "
            "or the folder of the diffusion runs: --runs runs/NAME."
        )
    if task.shape[0] not in (1, 3):
        raise ValueError(f"{path} makes images of {task.shape[0]} channels; only those of 1 or 3 become PNG files.")
    return task.to(device)


# ---- classes


def _labels(task: "DiffusionTask", options: argparse.Namespace) -> tuple[list[int] | None, float]:
    """Return the label of each image, ``None`` for images of no class, and their guidance scale."""
    classes, guidance = options.classes, options.guidance
    if classes == ["none"] and "none" not in (task.class_names or ()):
        return None, _guidance_to_no_class(task, guidance)
    if task.no_class is None:
        if classes is not None:
            raise ValueError("--classes needs a conditional task; that of the checkpoint knows no classes.")
        return None, guidance
    if classes is None:
        chosen = list(range(task.no_class))
    else:
        chosen = [_label(text, task.no_class, task.class_names or []) for text in classes]
    return [chosen[index % len(chosen)] for index in range(options.count)], guidance


def _guidance_to_no_class(task: "DiffusionTask", guidance: float) -> float:
    if task.no_class is None:
        return guidance
    if guidance not in (0, 1):
        raise ValueError(f"--guidance {guidance} leads to a class, but --classes none to none. Leave one of them out.")
    if task.label_dropout == 0:
        raise ValueError("--classes none needs a task that was trained with label_dropout above 0.")
    return 0.0


def _label(text: str, num_classes: int, names: list[str]) -> int:
    if text in names:  # even if it looks like the number of another class: users see names elsewhere
        return names.index(text)
    try:
        label = int(text)
    except ValueError:
        hint = nearest(text, names) if names else f": it has no names. Give numbers in 0..{num_classes - 1}."
        raise ValueError(f"--classes {text}: the checkpoint knows no such class{hint}") from None
    if not 0 <= label < num_classes:
        raise ValueError(f"--classes must be names of classes or in 0..{num_classes - 1}, got {label}.")
    return label


# ---- images


def _sample(task: "DiffusionTask", options: argparse.Namespace, checkpoint: Path) -> Path:
    """Make the images, write them batch by batch, and return their folder."""
    labels, guidance = _labels(task, options)
    sample = partial(
        task.sample,
        steps=options.steps,
        guidance=guidance,
        sampler=options.sampler,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    starts = range(0, options.count, options.batch_size)
    traced = min(TRACED_IMAGES, options.count) if options.trace else 0
    batches = len(starts) + math.ceil(traced / options.batch_size)
    folder: Path | None = None
    shown: list[Tensor] = []
    with _progress_bar(task, batches * options.steps):
        for start in starts:
            stop = min(start + options.batch_size, options.count)
            images = _pixels(sample(stop - start, first=start, classes=labels and labels[start:stop]))
            if folder is None:  # only once the options are known to fit
                folder = _checkpoint_argument.new_folder(options, checkpoint, f"samples/seed={options.seed}")
            for index, image in enumerate(images, start):
                _write(image, folder / f"{index:06d}.png")
            shown += images[: GRID_IMAGES - len(shown)]
        assert folder is not None
        if labels is not None:
            _write_classes(task, labels, folder / "classes.csv")
        _save(_grid(task, shown, labels, options), folder / "grid.png")
        if traced:
            strips = _pixels(sample(traced, classes=labels and labels[:traced], trace=True))
            _save(_strips(task, strips, labels, options), folder / "trace.png")
    return folder


@contextmanager
def _progress_bar(task: "DiffusionTask", total: int) -> Iterator[None]:
    """Show the number of network runs on a terminal."""
    with tqdm(total=total, desc="sampling", unit="step", disable=None) as bar:

        def count_run(*_: object) -> None:  # what a hook returns would replace the output
            bar.update()

        hook = task.backbone.register_forward_hook(count_run)
        try:
            yield
        finally:
            hook.remove()


def _pixels(images: Tensor) -> Tensor:
    if not images.isfinite().all():
        raise ValueError("The images are not finite: the network diverged in training, or --guidance is too large.")
    return (images * 255).round().to("cpu", torch.uint8)


def _grid(
    task: "DiffusionTask", images: Sequence[Tensor], labels: Sequence[int] | None, options: argparse.Namespace
) -> Image.Image:
    """Return a grid of the images in the order of the files, with one column per class if there are several."""
    from dia_lightning.drawing import draw_table

    columns, headings = math.ceil(math.sqrt(len(images))), []
    if labels is not None:
        turn = _names(task, labels[: len(options.classes or range(task.no_class or 1))])
        if 1 < len(turn) <= MOST_COLUMNS:
            columns, headings = len(turn), turn
    rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
    guidance = "" if options.guidance == 1 else f", guidance {options.guidance:g}"
    classes = "" if headings or labels is None or len(set(labels)) > 1 else f" of {_names(task, labels[:1])[0]}"
    title = f"{len(images)} samples{classes}, {options.steps} steps of {options.sampler}{guidance}, seed {options.seed}"
    return draw_table(rows, title, headings=headings)


def _strips(
    task: "DiffusionTask", traces: Tensor, labels: Sequence[int] | None, options: argparse.Namespace
) -> Image.Image:
    from dia_lightning.callbacks.generated_grid import draw_trace

    made = task.denoising(steps=options.steps, guidance=1.0, sampler=options.sampler, seed=options.seed)
    return draw_trace(list(traces), made, names=[] if labels is None else _names(task, labels[: len(traces)]))


def _names(task: "DiffusionTask", labels: Sequence[int]) -> list[str]:
    names = task.class_names
    return [str(label) if names is None else names[label] for label in labels]


# ---- files


def _write(image: Tensor, path: Path) -> None:
    pixels = image.permute(1, 2, 0).numpy()
    _save(Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels), path)


def _write_classes(task: "DiffusionTask", labels: Sequence[int], path: Path) -> None:
    lines = [["file", "label", "class"]]
    lines += [[f"{i:06d}.png", str(label), _names(task, [label])[0]] for i, label in enumerate(labels)]
    with _writing(path) as part, part.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def _save(image: Image.Image, path: Path) -> None:
    with _writing(path) as part:
        image.save(part, format="PNG")


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        with written_whole(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Give another folder: --out.") from error
