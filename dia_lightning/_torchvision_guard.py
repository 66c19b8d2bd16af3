"""Import this before torchvision: a mismatch of torch and torchvision then gives one line, not a traceback."""

from importlib import metadata

INSTALL = (
    "install both together: python -m pip install --upgrade torch torchvision "
    "(without a GPU add --index-url https://download.pytorch.org/whl/cpu)"
)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _check_pair() -> None:
    try:
        import torch
        import torchvision  # noqa: F401

        # Versions alone do not show it: pip accepts any pair, and a CPU build of one with a CUDA build of the other.
        # The compiled operators only load if the two match.
        fits = hasattr(torch.ops.torchvision, "nms")
    except (ImportError, OSError, RuntimeError):  # RuntimeError: "operator torchvision::nms does not exist"
        fits = False
    if not fits:
        versions = f"torch {_version('torch')} and torchvision {_version('torchvision')}"
        raise ImportError(f"{versions} do not fit: {INSTALL}")


_check_pair()
