"""Packs CIFAR-100 into a file of limited size: ``python -m benchmarks.pack_cifar ROOT FILE``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
#: Images ``[N, 3, H, W]`` and labels of ``train`` and ``test``.
Splits: TypeAlias = dict[str, tuple[Bytes, NDArray[Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Write as many images as fit, equally many per class."""
    from torchvision.datasets import CIFAR100

    parser = argparse.ArgumentParser(prog="python -m benchmarks.pack_cifar", description=__doc__)
    parser.add_argument("root", type=Path, help="folder that holds cifar-100-python/")
    parser.add_argument("file", type=Path, help="the .npz to write")
    parser.add_argument("--mebibytes", type=float, default=56, help="maximum size of the file, 56 by default")
    parser.add_argument("--test_share", type=float, default=0.2, help="share of test images, 0.2 by default")
    options = parser.parse_args(argv)
    splits = {}
    for name in ("train", "test"):
        data = CIFAR100(options.root, train=name == "train", download=False)
        splits[name] = data.data.transpose(0, 3, 1, 2), np.array(data.targets)
    for name, kept in pack(options.file, splits, int(options.mebibytes * 2**20), options.test_share).items():
        print(f"{name}: kept {kept} of {len(splits[name][1])} images")
    print(f"{options.file}: {options.file.stat().st_size / 2**20:.1f} MiB")


def pack(file: Path, splits: Splits, limit: int, test_share: float) -> dict[str, int]:
    """Write a file of at most ``limit`` bytes, and return the number of images per split.

    Args:
        file: an ``.npz``.
        splits: the images to choose from.
        limit: maximum size in bytes.
        test_share: share of test images; no more are taken than exist.

    Raises:
        ValueError: if the name does not end in ``.npz``, the share is not between 0 and 1, or not even one image per
            class fits.
    """
    if file.suffix != ".npz":
        raise ValueError(f"The file name must end in .npz, got {file}.")
    if not 0 < test_share < 1:
        raise ValueError(f"The share of test images must be between 0 and 1, got {test_share}.")
    images = int(limit / (np.prod(splits["train"][0].shape[1:]) * 0.6))  # more than will fit
    while True:
        wanted = {"test": int(images * test_share), "train": int(images * (1 - test_share))}
        arrays = {}
        for name, (pixels, labels) in splits.items():
            first = _first_of_each_class(labels, wanted[name])
            if len(first) == 0:
                raise ValueError(f"{limit} bytes do not hold one image per class. Allow a larger file.")
            arrays[f"{name}_differences"] = differences(pixels[first])
            arrays[f"{name}_labels"] = labels[first].astype(np.uint8)
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        if (size := file.stat().st_size) <= limit:
            return {name: len(arrays[f"{name}_labels"]) for name in splits}
        images = int(sum(len(arrays[f"{name}_labels"]) for name in splits) * min(limit / size, 0.999))


def unpack(file: Path) -> Splits:
    """Return the contents of a file."""
    with np.load(file) as arrays:
        return {
            name: (from_differences(arrays[f"{name}_differences"]), arrays[f"{name}_labels"])
            for name in ("train", "test")
        }


def differences(pixels: Bytes) -> Bytes:
    """Return differences to the pixels above and to the left, modulo 256, which compress better by a fifth."""
    zero = np.uint8(0)
    return np.diff(np.diff(pixels, axis=-1, prepend=zero), axis=-2, prepend=zero)


def from_differences(packed: Bytes) -> Bytes:
    """Undo :func:`differences`."""
    return packed.cumsum(-2, dtype=np.uint8).cumsum(-1, dtype=np.uint8)


def _first_of_each_class(labels: NDArray[Any], wanted: int) -> NDArray[np.int64]:
    per_class = min(wanted // len(np.unique(labels)), np.bincount(labels).min())
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]))


if __name__ == "__main__":
    main()
