"""A description of the attached attention that a config can hold, and how to read it back.

The ``save_pretrained`` of diffusers and transformers networks writes this description into their config.
Folders and pipelines of :mod:`dia_lightning.models` are written and loaded with it too.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning._hyperparameters import OBJECT, primitive
from dia_lightning.attention._links import Link

#: Config keys of the description and of the hint on how to load it.
DESCRIPTION, LOADS_WITH = "dia", "dia_loads_with"
_LARGEST_EXAMPLE = 2**28  # entries; a file may ask for anything


def describe(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``attach`` that differ from its defaults, as JSON types.

    Args:
        arguments: by name; ``attention`` is always kept.
        defaults: values that need not be written.
    """
    kept = {
        name: value
        for name, value in arguments.items()
        if name not in defaults or not (value is defaults[name] or (isinstance(value, str) and value == defaults[name]))
    }
    return {name: _example_words(value) if name == "example" else primitive(value) for name, value in kept.items()}


def remember(network: nn.Module, description: dict[str, Any]) -> None:
    """Store a description with the attention attached to a network."""
    for module in network.modules():
        for link in _links(module):
            link.chain.description = description


def descriptions(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the descriptions of a network and its parts, by path of the part; empty for a plain network.

    Raises:
        ValueError: if it was attached to a module around the network.
    """
    found = {}
    for path, block in network.named_modules():
        for link in _links(block):
            whole, inner = f".{path}", f".{link.path}" if link.path else ""
            if link.chain.description is None or not whole.endswith(inner):
                raise ValueError(
                    f"Attention was attached to a module around this {type(network).__name__}, so its config "
                    "cannot say how to load it. Save that module, or attach to this one: attach(module.network, ...)."
                )
            found[whole.removesuffix(inner).removeprefix(".")] = link.chain.description
    return found


def _links(module: nn.Module) -> tuple[Link, ...]:
    return vars(module).get("dia_links", ())  # type: ignore[no-any-return]


def arguments_of(description: Any, given: Mapping[str, Any], hint: str) -> dict[str, Any]:
    """Return the arguments of ``attach`` that a description stands for.

    Args:
        description: as made by :func:`describe`, from an untrusted file.
        given: objects that could not be saved, by name; they take precedence.
        hint: how to give NAME, for the message.

    Raises:
        ValueError: if the description is invalid, or an object is missing.
    """
    if not isinstance(description, Mapping) or "attention" not in description or "model" in description:
        raise ValueError(f"The config must say which attention is attached, got {description!r:.200}.")
    arguments = {**description, **given}
    for name, value in arguments.items():
        if name not in given and OBJECT in repr(value):
            raise ValueError(
                f"{name} was an object when this network was saved ({value!r:.200}), which no file can hold. Give it "
                f"again: {hint.replace('NAME', name)}."
            )
    if "example" in description and "example" not in given:
        arguments["example"] = _example(description["example"])
    return arguments


def saving(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let the ``save_pretrained`` of diffusers or transformers write the description into the config."""

    @functools.wraps(method)
    def save_pretrained(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # looked up now: classes may change after ours was made of them
        kinds = [kind for kind in type(network).__mro__ if "dia_recipe" not in vars(kind)]
        save = next(vars(kind)[method.__name__] for kind in kinds if method.__name__ in vars(kind))
        with _in_config(network):
            return save(network, *args, **kwargs)

    return save_pretrained


@contextmanager
def _in_config(network: Any) -> Iterator[None]:
    config = getattr(network, "config", None)
    is_of_diffusers = hasattr(network, "register_to_config")
    if not (is_of_diffusers or hasattr(config, "to_json_string")):
        yield  # a class with its own way of saving knows how to load itself
        return
    name = type(network).__name__
    try:
        description = descriptions(network)[""]
    except ValueError as error:
        warnings.warn(str(error), stacklevel=4)
        yield
        return
    entries = {
        DESCRIPTION: description,
        LOADS_WITH: f"from dia_lightning.models import from_pretrained; from_pretrained({name}, folder) loads the "
        f"attention too, which {name}.from_pretrained leaves out",
    }
    if is_of_diffusers:
        before = network.config
        network.register_to_config(**entries)
    else:
        vars(config).update(entries)
    try:
        yield
    finally:
        if is_of_diffusers:
            network._internal_dict = before
        else:
            for entry in entries:
                vars(config).pop(entry, None)


def _example_words(value: Any) -> Any:
    """Return the shapes and types of an example, without its contents."""
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_example_words(item) for item in value]}
    if isinstance(value, list):
        return [_example_words(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": {str(name): _example_words(item) for name, item in value.items()}}
    return primitive(value)


def _example(words: Any) -> Any:
    if isinstance(words, list):
        return [_example(item) for item in words]
    if not isinstance(words, dict):
        return words
    if isinstance(words.get("tuple"), list):
        return tuple(_example(item) for item in words["tuple"])
    if isinstance(words.get("dict"), dict):
        return {name: _example(item) for name, item in words["dict"].items()}
    shape, dtype = words.get("tensor"), getattr(torch, str(words.get("dtype")), None)
    sizes_fit = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes_fit or not isinstance(dtype, torch.dtype) or math.prod(shape or ()) > _LARGEST_EXAMPLE:
        raise ValueError(f"The config has an invalid example: {words!r:.200}. Give one: example=...")
    return torch.zeros(shape, dtype=dtype)  # type: ignore[arg-type]
