"""What parts of this package need beyond torch and torchvision, and how to install it if missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

#: The extra (see pyproject.toml) that includes a package.
_EXTRA_OF = {
    **dict.fromkeys(("lightning", "matplotlib", "sklearn", "torchmetrics", "tqdm", "wandb", "yaml"), "lightning"),
    "jsonargparse": "cli",
    "timm": "timm",
    **dict.fromkeys(("diffusers", "torch_fidelity"), "diffusion"),
    **dict.fromkeys(("huggingface_hub", "safetensors"), "hub"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
}


def require(*packages: str, by: str) -> Any:
    """Import packages before a part of this package that needs them.

    Args:
        packages: their names, or those of modules in them.
        by: what needs them, the subject of the message.

    Returns:
        The last module.

    Raises:
        ImportError: if one is missing, with what to install.
    """
    with needed_by(by):
        return [import_module(package) for package in packages][-1]


@contextmanager
def needed_by(part: str) -> Iterator[None]:
    """State which extra to install if an import inside fails because a package is missing.

    Args:
        part: what needs the package, the subject of the message.

    Raises:
        ImportError: instead of the error about the package.

    Example:
        >>> with needed_by("FID"):
        ...     raise ModuleNotFoundError("No module named 'torch_fidelity'", name="torch_fidelity")
        Traceback (most recent call last):
        ...
        ImportError: FID needs torch_fidelity: pip install "dia-lightning[diffusion]".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        raise missing(part, package, _EXTRA_OF[package]) from None


def missing(part: str, packages: str, extra: str) -> ImportError:
    """Return the error that states what a part needs and which extra includes it."""
    return ImportError(f'{part} needs {packages}: pip install "dia-lightning[{extra}]".')
