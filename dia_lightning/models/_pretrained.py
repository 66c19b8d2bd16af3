"""Networks with attention as folders, local and on the Hugging Face Hub."""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dia_lightning import _hub
from dia_lightning.attention import attach, detach, is_attached, plain_class
from dia_lightning.attention.description import DESCRIPTION, LOADS_WITH, arguments_of, descriptions

Network = TypeVar("Network", bound=nn.Module)
_CARD = """---
tags:
- attention
- dia-lightning
---

# {name} with shared attention

Weights of a `{name}` and the options that attention was attached with by
[dia-lightning](https://arxiv.org/abs/2210.16101): `{dia}`.

```python
from dia_lightning.models import from_pretrained
network = ...  # the {name}, built as for training, without attention
network = from_pretrained(network, "this folder or repository")
```
"""


def save_pretrained(network: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a network to a folder: weights (``model.safetensors``), what is attached (``config.json``), a model card.

    Networks of diffusers and transformers can also be saved by their own ``save_pretrained``, which writes the same
    description of the attention into their config.

    Args:
        network: with or without attention.
        folder: the folder to write to; replaces files of the same names, but not your own ``README.md``.

    Returns:
        The folder.

    Raises:
        ValueError: if attention was attached to a module around the network.
        ImportError: if safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import from_pretrained, get_model, save_pretrained
        >>> network = attach(get_model("cifar_resnet", depth=11), "dia-lstm", reduction=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_pretrained(network, folder)
        ...     loaded = from_pretrained(get_model("cifar_resnet", depth=11), folder)
        >>> loaded.layer1[0].dia.input_reduce.out_features
        8
    """
    attached = descriptions(network)
    config = {"network": type(network).__name__, DESCRIPTION: attached, "versions": _hub.versions()}
    return _hub.write_folder(folder, network, config, _CARD.format(name=type(network).__name__, dia=attached))


def from_pretrained(
    network: Network | type[Network],
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **arguments: Any,
) -> Network:
    """Attach the attention of a folder or repository to a plain network, and load all the weights. No code is run.

    Args:
        network: the plain network, built as it was before saving; or a class of diffusers or transformers, which is
            built from the config.
        source: a folder written by :func:`save_pretrained` or that of diffusers or transformers, or a Hugging Face Hub
            repository, such as ``"user/network"``.
        revision: branch, tag or commit of a repository.
        token: for a private repository; by default that of ``hf auth login``.
        cache_dir: where downloads are kept.
        local_files_only: only use files that are already downloaded.
        **arguments: of :func:`~dia_lightning.attention.attach`, overriding those in the config: attention or sites that
            were objects and could not be saved.

    Returns:
        The network, with attention and in evaluation mode.

    Raises:
        ValueError: if the folder is damaged or holds a different network, or an object is missing.
        ImportError: if safetensors, or for a repository huggingface_hub, is not installed.

    Example:
        >>> from diffusers import UNet2DModel
        >>> network = from_pretrained(UNet2DModel, "unet")  # doctest: +SKIP
    """
    folder = _hub.fetch(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    config = _hub.read_config(folder)
    weights = _hub.read_weights(folder)
    described = _described(config, folder, arguments)
    built: Network = network if isinstance(network, nn.Module) else _build(network, config)
    if is_attached(built):
        raise ValueError("The network already has attention. Give the plain one: the config says what to attach.")
    try:
        _attach_all(built, described)
        _hub.load_strictly(built, _renamed(built, weights, described), str(source))
    except ValueError:
        if is_attached(built):
            detach(built)
        raise
    return built.eval()


def push_to_hub(
    network: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload network with dia-lightning",
) -> str:
    """Push what :func:`save_pretrained` writes to a Hugging Face Hub repository, creating it if needed.

    Args:
        network: with or without attention.
        repo_id: name of the repository, such as ``"user/network"``.
        private: whether a new repository is private; ``None`` for the default of the account.
        token: with write access; by default that of ``hf auth login``.
        commit_message: of the commit.

    Returns:
        URL of the commit.

    Raises:
        ValueError: if the network cannot be saved.
        ImportError: if huggingface_hub or safetensors is not installed.
    """
    return _hub.upload(partial(_save, network), repo_id, private=private, token=token, commit_message=commit_message)


def _save(network: nn.Module, folder: Path) -> None:
    save_pretrained(network, folder)


def _build(kind: Any, config: dict[str, Any]) -> Any:
    """Build a diffusers or transformers network from its config."""
    try:
        if hasattr(kind, "load_config"):  # of diffusers
            return kind.from_config(_harmless(config))
        if getattr(kind, "config_class", None) is not None:  # of transformers
            return kind(kind.config_class.from_dict(_harmless(config)))
    except Exception as error:  # an invalid config fails in many ways
        raise ValueError(
            f"The config does not describe a {kind.__name__} ({type(error).__name__}: {_hub.in_one_line(error)})."
        ) from error
    raise ValueError(
        f"{getattr(kind, '__name__', kind)} is neither a network nor a class of diffusers or transformers, which are "
        "built from a config. Give the network, built as it was before saving."
    )


def _harmless(config: Any) -> Any:
    """Return a config without the entries of attention, and without kernels, which transformers would download."""
    if not isinstance(config, dict):
        return config
    left_out = (DESCRIPTION, LOADS_WITH)
    return {
        name: _harmless(value)
        for name, value in config.items()
        if name not in left_out and "attn_implementation" not in name
    }


def _described(config: dict[str, Any], folder: Path, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the arguments of ``attach`` by the path of the part they are for."""
    found = config.get(DESCRIPTION)
    if found is None and "attention" in given:
        found = {"attention": None}
    if not isinstance(found, dict):
        raise ValueError(
            f"{str(folder / _hub.CONFIG)!r} does not say which attention is attached: {DESCRIPTION} must be an object, "
            f"got {found!r:.200}. Say it as attach() takes it: from_pretrained(network, folder, attention=...)."
        )
    if given and not found:
        raise ValueError(f"{str(folder)!r} holds a plain network. Omit {', '.join(given)}.")
    is_one = "attention" in found and not isinstance(found["attention"], dict)  # as diffusers and transformers save it
    hint = "from_pretrained(network, folder, NAME=...)"
    return {path: arguments_of(words, given, hint) for path, words in ({"": found} if is_one else found).items()}


def _attach_all(network: nn.Module, described: dict[str, dict[str, Any]]) -> None:
    for path, arguments in described.items():
        try:
            attach(network.get_submodule(path), **arguments)
        except (TypeError, AttributeError) as error:  # no such part or argument
            raise ValueError(f"attach() does not take what the config says: {_hub.in_one_line(error)}.") from error


def _renamed(network: Any, weights: dict[str, Tensor], described: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Return weights under the network's names; transformers writes older ones, which its own loader maps."""
    if getattr(network, "config_class", None) is None or weights.keys() == network.state_dict().keys():
        return weights

    class Attached(plain_class(network)):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            _attach_all(self, described)

    Attached.__name__ = plain_class(network).__name__
    config = copy.deepcopy(network.config)
    try:
        loaded, found = Attached.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    except Exception:  # load_strictly reports what does not match
        return weights
    fits = not any(found.values())
    return loaded.state_dict() if fits else weights
