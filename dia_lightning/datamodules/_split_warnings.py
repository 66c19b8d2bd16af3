"""Warnings about the files of a split when it is opened, only if something is left out or doubtful."""

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image

from dia_lightning.datamodules._images import MAX_PIXELS, deep_values, has_deep_colours, open_image
from dia_lightning.datamodules._sampling import Samples
from dia_lightning.datamodules.sources import FileSource, Source

_LOOKED_AT = 16  # files of a split; a set of a million must open instantly
_USUAL_DEPTHS = range(1, 15)  # what sensors have; an image in the darker half of 16 bits may just be dark
_NAMED = 3  # how many files a message names


def warn_of_files_left_out(left_out: Counter[str], where: object) -> None:
    """Warn of the files that are left out, by ending.

    Args:
        left_out: as :class:`ImageFiles` has them.
        where: the folder.
    """
    if left_out:
        ranked = sorted(left_out.items(), key=lambda item: (-item[1], not item[0], item[0]))
        counts = ", ".join(f"{count} {name or 'without ending'}" for name, count in ranked)
        rank_zero_warn(
            f"{sum(left_out.values())} file(s) in {where} are no images that can be read here and are left out: "
            f"{counts}. If they are data, convert them to PNG, say."
        )


def warn_of_unused_depth(source: Source, what: str) -> None:
    """Check in a few files of a split whether their bits and frames are all used.

    Args:
        source: the split; images that are not in files are ignored.
        what: name of the split in messages.
    """
    if not isinstance(source, FileSource):
        return
    step = max(1, len(source.paths) // _LOOKED_AT)
    paths = source.paths[::step][:_LOOKED_AT]
    depths: list[int] = []
    frames: list[str] = []
    for path in paths:
        try:
            with open_image(path) as image:
                frames += [path] if _has_more_frames(image) else []
                image.seek(0)
                depths.append(_used_bits(image))
        except Exception:  # loading the sample raises an error that names it
            continue
    if frames:
        rank_zero_warn(
            f"{len(frames)} of {len(paths)} files of {what} that were looked at have several frames or pages, such as "
            f"{frames[0]}: only the first of each is used. Save the others as files of their own to use them."
        )
    used = max(depths, default=0)
    if used in _USUAL_DEPTHS and used < source.bit_depth:
        rank_zero_warn(
            f"Files of {what} have 16 bits, but none of those looked at uses more than {used} (up to {2**used - 1}), "
            f"and they are scaled by {2**source.bit_depth - 1}, so the images are dark and coarse. Set bit_depth={used}"
            " for all commands (grey files), or save them with 8 bits (files in colour)."
        )


def _used_bits(image: Image.Image) -> int:
    if image.width * image.height > MAX_PIXELS:
        return 0
    values = deep_values(image)
    if values is not None:
        return int(values.max()).bit_length()
    if has_deep_colours(image):  # the upper 8 of 16 bits
        top = int(np.asarray(image.convert("RGB")).max())
        return top.bit_length() + 8 if top else 0
    return 0


def _has_more_frames(image: Image.Image) -> bool:
    if image.format == "MPO" or getattr(image, "n_frames", 1) == 1:  # a phone's MPO has a second view of the same
        return False
    size = image.size
    image.seek(1)
    return image.size == size  # otherwise a thumbnail of the first page


def warn_of_shared_files(train: Samples, other: Samples, what: str) -> None:
    """Warn of files that are both trained and evaluated on, under any name or link.

    Args:
        train: the training samples.
        other: the evaluation samples.
        what: name of the others in messages.
    """
    _, ours, theirs = np.intersect1d(train.inodes, other.inodes, return_indices=True)
    pairs = [(train.name(int(here)), other.name(int(there))) for here, there in zip(ours, theirs, strict=True)]
    shared = [there for here, there in pairs if here == there or _same_file(here, there)]
    if shared:
        rank_zero_warn(
            f"{len(shared)} of {len(other)} images of {what} are training images, too ({named(sorted(shared))}), so "
            "its scores say little about new images. Remove them from one of the two."
        )


def warn_of_untrained_classes(names: Sequence[str], trained: set[int], seen: set[int], what: str) -> None:
    """Report classes without training samples, with a warning if they are evaluated on.

    Args:
        names: of all classes.
        trained: positions in ``names`` of classes with training samples.
        seen: positions of those that are evaluated on.
        what: name of the evaluated part in messages.
    """
    if lost := sorted((seen - trained) & set(range(len(names)))):
        rank_zero_warn(
            f"Class(es) {named([names[label] for label in lost])} of {what} have no training sample, so they cannot be "
            "learned. Add some, lower val_split, or leave the class(es) out."
        )
    if absent := [name for label, name in enumerate(names) if label not in trained | seen]:
        rank_zero_info(f"Class(es) {named(absent)} have no sample in training and {what}.")


def _same_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def named(names: Sequence[str]) -> str:
    """Return the first few names for a message."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
