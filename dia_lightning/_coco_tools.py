"""The installed implementation of COCO's evaluation and masks: faster-coco-eval, else pycocotools."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from dia_lightning._extras import missing


def coco_backend() -> Literal["faster_coco_eval", "pycocotools"]:
    """Return the name of the implementation, as torchmetrics expects it.

    Raises:
        ImportError: if neither is installed.
    """
    if find_spec("faster_coco_eval") is not None:
        return "faster_coco_eval"
    if find_spec("pycocotools") is not None:
        return "pycocotools"
    raise missing("Detection", "faster-coco-eval or pycocotools", "detection")


def mask_tools() -> Any:
    """Return the module with ``encode``, ``decode`` and ``frPyObjects``, the functions of ``pycocotools.mask``.

    Raises:
        ImportError: if neither implementation is installed.
    """
    return import_module("faster_coco_eval.core.mask" if coco_backend() == "faster_coco_eval" else "pycocotools.mask")
