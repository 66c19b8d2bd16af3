"""Weights from a file, without the rest of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dia_lightning._checkpoint_file import DamagedFileError, load
from dia_lightning._checkpoint_kind import WrongCheckpointError, kind_of
from dia_lightning._extras import require


def load_weights(network: nn.Module, path: str) -> str:
    """Load a network's weights from a file and report what was loaded.

    The file may be a checkpoint of this package, a state dict (``.pt``, ``.pth``, bare or under ``state_dict`` or
    ``model``), or a ``.safetensors`` file.
    Weights of a plain network can be loaded into one with attention, whose unit is then left at initialization, as is
    a classifier with a different number of classes. Any other mismatch is an error.

    Args:
        network: whose weights are replaced, in place.
        path: the file.

    Returns:
        One sentence for the log.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is remote or damaged, or holds the weights of a different network.
    """
    weights = _without_prefix(_state_dict(_read(path), path), "backbone.")
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    outside = [name for name in layers if not _belongs_to_attention(name)]
    return _load(network, weights, path, heads=outside[-1:])


#: What depends on the number of classes in torchvision's detectors.
_DETECTOR_HEADS = ("roi_heads.box_predictor", "roi_heads.mask_predictor", "head.classification_head")


def load_detector_weights(detector: nn.Module, path: str) -> str:
    """Load a detector's weights, or a classifier's into its backbone, and report what was loaded.

    The file is read as by :func:`load_weights`. Layers that depend on the number of classes are left at initialization
    if that number differs; weights of a classifier that the backbone lacks are ignored.

    Args:
        detector: whose weights are replaced, in place.
        path: the file.

    Returns:
        One sentence for the log.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is remote or damaged, or holds the weights of a different network.
    """
    weights = _without_prefix(_state_dict(_read(path), path), "detector.")
    if any(key.startswith(("rpn.", "roi_heads.", "head.classification_head.")) for key in weights):
        return _load(detector, weights, path, heads=_DETECTOR_HEADS)
    pyramid: Any = detector.backbone
    body = getattr(pyramid, "body", pyramid)
    weights = _without_prefix(_without_prefix(weights, "backbone."), "features.")
    kept = {
        f"{name}{key[len(name) :]}": value
        for name, _ in body.named_children()  # such as "stages_0", where timm's classifier has "stages.0"
        for key, value in weights.items()
        if f"{key[: len(name)].replace('.', '_')}{key[len(name) :][:1]}" == f"{name}."
    }
    return f"{_load(body, kept, path, heads=())} They are those of the backbone."


def _load(network: nn.Module, weights: dict[str, Tensor], path: str, heads: Sequence[str]) -> str:
    """Load weights into a network; those of the given heads may have different shapes."""
    own = network.state_dict()
    head = [key for key, value in weights.items() if key in own and own[key].shape != value.shape]
    if any(not key.startswith(tuple(f"{name}." for name in heads)) for key in head):
        raise ValueError(f"{path!r} holds a different network: {_sizes(head, weights, own)}.")
    result = network.load_state_dict({key: value for key, value in weights.items() if key not in head}, strict=False)
    attention = [key for key in result.missing_keys if _belongs_to_attention(key)]
    if attention and any(map(_belongs_to_attention, weights)):
        raise ValueError(
            f"{path!r} holds different attention than this network: {_some(attention)} missing. Use the same "
            "attention, share, plug and identity as in training, or a file of the plain network."
        )
    missing = sorted(set(result.missing_keys) - set(attention) - set(head))
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path!r} holds a different network: {len(missing)} weights are missing ({_some(missing)}) and "
            f"{len(result.unexpected_keys)} are unexpected ({_some(result.unexpected_keys)})."
        )
    kept = [*(["the attention"] if attention else []), *(["the classifier"] if head else [])]
    keep = "keeps its" if len(kept) == 1 else "keep their"
    return f"Weights of {len(weights) - len(head)} tensors from {path}" + (
        f"; {' and '.join(kept)} {keep} initial values." if kept else "."
    )


def _read(path: str) -> Any:
    if "://" in path:
        raise ValueError(f"Weights are read from local files only, got {path!r}. Download and check it first.")
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {path!r} to load weights from.")
    is_safetensors = file.suffix == ".safetensors"
    read = require("safetensors.torch", by=f"Reading {path!r}").load_file if is_safetensors else load
    try:
        return read(file)
    except DamagedFileError as error:
        raise ValueError(f"{path!r} is damaged or not a weights file ({error.reason}).{error.instead}") from error
    except Exception as error:
        raise ValueError(f"{path!r} is damaged or not a weights file ({type(error).__name__}: {error}).") from error


def _state_dict(found: Any, path: str) -> dict[str, Tensor]:
    content = found
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WrongCheckpointError(
            f"{path!r} holds no state dict, but {kind_of(found)}: expected tensors by name, or a checkpoint with "
            "'state_dict'. Give another file."
        )
    return {key.replace("_orig_mod.", ""): value for key, value in content.items()}  # of torch.compile


def _without_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights below a prefix, or all if there are none, without the prefix DataParallel adds."""
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return own or {key.removeprefix("module."): value for key, value in weights.items()}


def _belongs_to_attention(key: str) -> bool:
    return any(part == "dia" or part.startswith(("branch_norm", "unit_norm")) for part in key.split("."))


def _sizes(keys: list[str], weights: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    return ", ".join(f"{key} is {tuple(weights[key].shape)}, not {tuple(own[key].shape)}" for key in keys[:3])


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "") if keys else "none"
