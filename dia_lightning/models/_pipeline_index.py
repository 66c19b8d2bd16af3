"""Which classes the folder of a diffusers pipeline may name: diffusers would import any class its files name."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dia_lightning._hub import read_object

INDEX = "model_index.json"
#: Classes that this package writes, and diffusers classes that it loads, by the library given in the index.
_NETWORKS = {
    "dia_lightning.models.pipelines": ("DIAUNet2DModel", "DIADiTTransformer2DModel"),
    "diffusers": ("UNet2DModel", "DiTTransformer2DModel"),
}


def check_index(folder: Path, given: Collection[str]) -> None:
    """Refuse a folder whose files name classes other than a network and a scheduler, before anything is imported.

    Args:
        folder: of a pipeline.
        given: names of the parts that the caller passes, which are not read.

    Raises:
        ValueError: if it names anything else, or is not the folder of a pipeline.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"{str(folder)!r} has no {INDEX}: it is not the folder of a pipeline.")
    index = read_object(folder / INDEX)
    allowed: dict[str, Any] = {"unet": _is_network, "scheduler": _is_scheduler}
    if not isinstance(index.get("_class_name", ""), str):
        _refuse(folder / INDEX, "_class_name", index["_class_name"])
    for name, value in index.items():
        if name in given or name.startswith("_") or value in ([None, None], None):
            continue
        is_plain = (
            name == "id2label" and isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
        )
        if not (is_plain or isinstance(value, bool | int | float) or allowed.get(name, _is_nothing)(value)):
            _refuse(folder / INDEX, name, value)
    if "unet" not in given:
        check_network(folder / "unet")


def check_network(folder: Path) -> None:
    """Refuse a diffusers network whose config asks for a library that would be imported to load it.

    Raises:
        ValueError: if it does.
    """
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    for name in ("quantization_config", "auto_map", "_auto_class"):
        if name in config:
            _refuse(path, name, config[name])


def _is_network(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[1] in _NETWORKS.get(str(value[0]), ())


def _is_scheduler(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and value[0] == "diffusers" and isinstance(value[1], str)
    return is_pair and re.fullmatch(r"[A-Z]\w*Scheduler", value[1]) is not None


def _is_nothing(value: Any) -> bool:
    return False


def _refuse(path: Path, name: str, value: Any) -> None:
    raise ValueError(
        f"{str(path)!r} names {value!r:.100} as {name}, but no class is imported because a file says so, except a "
        "UNet2DModel or DiTTransformer2DModel, with or without attention, and a diffusers scheduler. If you trust "
        f"it, build it and pass it: DIAPipeline.from_pretrained(folder, {name}=...)."
    )
