"""Folders with weights and a config, local and on the Hugging Face Hub. None of their code is run."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning._extras import require
from dia_lightning._version import __version__
from dia_lightning._whole_files import written_whole

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
#: Names of weights in folders of this package, transformers and diffusers.
_WEIGHTS = (WEIGHTS, "diffusion_pytorch_model.safetensors")
_SHARING = "Sharing networks"  # which needs packages
#: Marks a card that may be overwritten.
_OURS = "<!-- Written by dia-lightning. Take this line out to keep your own text. -->"


def fetch(
    source: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    patterns: Sequence[str] = (CONFIG, "*.safetensors", "*.safetensors.index.json"),
) -> Path:
    """Return a local folder, or that of a Hub repository after downloading it.

    Raises:
        ValueError: if it is neither.
        ImportError: if huggingface_hub is needed and not installed.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(source)
    is_name = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    if folder.exists() or not is_name:
        raise ValueError(f"{name!r} is neither a folder nor the name of a repository, such as 'user/network'.")
    try:
        found = require("huggingface_hub", by=_SHARING).snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
        )
    except ImportError:
        raise
    except Exception as error:  # no network, no such repository, no access, ...
        raise ValueError(
            f"{name!r} is not a folder, and the Hugging Face Hub does not serve it ({type(error).__name__}: "
            f"{in_one_line(error)})."
        ) from error
    return Path(found)


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    commit_message: str,
) -> str:
    """Write a folder with ``save``, commit it to a Hub repository, and return the URL of the commit.

    Raises:
        ValueError: if the Hub refuses it.
        ImportError: if huggingface_hub is not installed.
    """
    api = require("huggingface_hub", by=_SHARING).HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))  # first, so that a failed save creates no repository
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            name = getattr(made, "repo_id", repo_id)  # with the user name, if omitted
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message))
        except Exception as error:  # no network, no access, no such name, ...
            raise ValueError(
                f"The Hugging Face Hub refuses {repo_id!r} ({type(error).__name__}: {in_one_line(error)}). Log "
                "in with `hf auth login`, or pass a token with write access."
            ) from error


def write_folder(folder: str | os.PathLike[str], module: nn.Module, config: Mapping[str, Any], card: str) -> Path:
    """Write weights, config and model card; each file is written atomically, and a custom card is kept.

    Raises:
        ValueError: if the folder is a file, or the weights cannot be written.
        ImportError: if safetensors is not installed.
    """
    safetensors = require("safetensors.torch", by=_SHARING)
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(folder)!r} is a file. Give a folder.")
    if any(hasattr(tensor, "full_tensor") for tensor in module.state_dict().values()):
        raise ValueError("The weights are sharded over processes. Save what a checkpoint of the run loads as.")
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    # a weight that two layers share is written once
    _write(path / WEIGHTS, lambda file: safetensors.save_model(module, str(file), metadata={"format": "pt"}))
    _write(path / CONFIG, lambda file: file.write_text(f"{text}\n", encoding="utf-8"))
    own = path / CARD
    if not own.exists() or _OURS in own.read_text(encoding="utf-8", errors="replace"):
        _write(own, lambda file: file.write_text(card.replace("\n# ", f"\n{_OURS}\n\n# ", 1), encoding="utf-8"))
    return path


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        with written_whole(path) as part:
            write(part)
    except RuntimeError as error:  # of safetensors
        raise ValueError(f"{path} cannot be written: {in_one_line(error)}") from error


def versions() -> dict[str, str]:
    """Return the versions of the packages that write a folder."""
    return {"dia_lightning": __version__, "torch": str(torch.__version__)}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a folder.

    Raises:
        ValueError: if there is none, or it is not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {CONFIG}. Give a folder written by save_pretrained.")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: if it holds anything else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: it is not JSON ({in_one_line(error)}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got a {type(found).__name__}.")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder, from one safetensors file or from several with an index.

    Raises:
        ValueError: if there are none, or a file is missing or damaged.
        ImportError: if safetensors is not installed.
    """
    names = _weight_files(folder)
    safe_open = require("safetensors", by=_SHARING).safe_open
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  # it is not a dict
                written_once = {key: same for key, same in (file.metadata() or {}).items() if same in weights}
            weights.update({key: weights[same] for key, same in written_once.items() if key not in weights})
        except Exception as error:  # safetensors has no class for all of them
            raise ValueError(
                f"{str(folder / name)!r} is missing or damaged ({type(error).__name__}: {in_one_line(error)})."
            ) from error
    return weights


def _weight_files(folder: Path) -> list[str]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted({str(file) for file in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{str(index)!r} is damaged: it has no weight_map.") from error
            outside = [file for file in names if Path(file).name != file or not file.endswith(".safetensors")]
            if outside:
                raise ValueError(f"{str(index)!r} names {outside[0]!r}, which is not a safetensors file next to it.")
            return names
    raise ValueError(
        f"{str(folder)!r} has no {' or '.join(_WEIGHTS)}. Other formats, which may hold code, are not read."
    )


def load_strictly(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a network that has exactly these.

    Raises:
        ValueError: if they belong to a different network.
    """
    try:
        result = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(f"{source!r} holds a different network: {in_one_line(error)}") from error
    own = network.state_dict()
    missing = set(result.missing_keys)
    written = {tensor.data_ptr() for name, tensor in own.items() if name not in missing and tensor.numel()}
    missing = {name for name in missing if own[name].data_ptr() not in written}  # except shared ones
    if missing or result.unexpected_keys:
        some = ", ".join(sorted([*missing, *result.unexpected_keys])[:3])
        raise ValueError(
            f"{source!r} holds a different network: {len(missing)} weights are missing and "
            f"{len(result.unexpected_keys)} are unexpected (such as {some}). Build the network as it was when saved."
        )


def in_one_line(error: BaseException) -> str:
    """Return the message of an error, truncated."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]} ..."
