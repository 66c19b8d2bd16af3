"""Networks by name, like torchvision's registry."""

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from dia_lightning._choices import did_you_mean, near
from dia_lightning.models.libraries import LIBRARIES

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(name: str) -> Callable[[Builder], Builder]:
    """Register a function that builds a network under a name for ``get_model``.

    Args:
        name: what users write, without a slash: ``torchvision/`` and ``timm/`` are prefixes.

    Returns:
        A decorator that returns the function unchanged. The function should take keyword arguments with defaults,
        ``num_classes`` among them.

    Raises:
        ValueError: if the name is taken, or has a slash.

    Example:
        >>> from dia_lightning.models import CifarNetwork, get_model, register_model
        >>> @register_model("tiny")
        ... def tiny(*, num_classes: int = 10) -> CifarNetwork:
        ...     from dia_lightning.models import cifar_resnet
        ...     return cifar_resnet(depth=11, num_classes=num_classes)
        >>> get_model("tiny", num_classes=3).fc.out_features
        3
    """
    if "/" in name:
        raise ValueError(f"Model name {name!r} must not have a slash: prefixes are reserved for other libraries.")

    def register(builder: Builder) -> Builder:
        if name in _BUILDERS:
            raise ValueError(f"A model named {name!r} is already registered. Choose another name.")
        _BUILDERS[name] = builder
        return builder

    return register


def get_model(name: str, *, num_classes: int | None = None, **args: Any) -> nn.Module:
    """Build a network by name.

    Args:
        name: a name from ``list_models``: one of this package, ``torchvision/NAME`` or ``timm/NAME``.
        num_classes: number of classes; by default that of the builder (100 for networks of this package, 1000 for the
            libraries).
        **args: arguments of the builder, for example ``depth``. torchvision networks are not pretrained unless
            ``weights="DEFAULT"`` (or another name of theirs) is given, timm networks unless ``pretrained=True``; with
            pretrained weights and a different ``num_classes``, the classifier is replaced with a fresh one.

    Returns:
        The network, on the CPU and in training mode.

    Raises:
        ValueError: if the name is unknown (the message suggests similar names), or the builder does not take one of the
            arguments (the message lists those it takes).
        ImportError: if the name begins with ``timm/`` and timm is not installed.

    Example:
        >>> network = get_model("cifar_resnet", depth=11, num_classes=10)
        >>> sum(p.numel() for p in network.parameters())
        127642
    """
    if num_classes is not None:
        args["num_classes"] = num_classes
    prefix, slash, rest = name.partition("/")
    if slash and prefix in LIBRARIES:
        library = LIBRARIES[prefix]
        if not library.has(rest):
            raise ValueError(_unknown(name))
        return library.build(rest, args)
    if name not in _BUILDERS:
        raise ValueError(_unknown(name))
    accepted = inspect.signature(_BUILDERS[name]).parameters
    takes_anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    for argument in args:
        if argument not in accepted and not takes_anything:
            raise ValueError(f"{name} does not take {argument!r}. It takes: {', '.join(accepted)}.")
    return _BUILDERS[name](**args)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that ``get_model`` builds: this package's, then torchvision's and, where installed, timm's.

    Args:
        pattern: shell-style filter, for example ``"cifar_*"`` or ``"timm/vit_*"``.

    Returns:
        The sorted names of each library.

    Example:
        >>> list_models("resn*")
        ['resnet164', 'resnext101_8x32']
        >>> "torchvision/resnet18" in list_models("torchvision/resnet*")
        True
    """
    names = sorted(_BUILDERS)
    start = pattern.split("*")[0].split("?")[0].split("[")[0]
    for prefix, library in LIBRARIES.items():
        # a library excluded by the pattern need not be imported
        if start.startswith(f"{prefix}/") or f"{prefix}/".startswith(start):
            names += [f"{prefix}/{name}" for name in library.names()]
    return fnmatch.filter(names, pattern)


def _unknown(name: str) -> str:
    prefix, slash, rest = name.rpartition("/")
    if slash and prefix not in LIBRARIES:
        prefixes = " or ".join(f"{library}/NAME" for library in LIBRARIES)
        return f"Unknown model {name!r}. Other libraries are reached by {prefixes}."
    # a bare name may mean torchvision, whose registry has no prefix
    library = prefix or "torchvision"
    known = {other: f"{library}/{other}" for other in LIBRARIES[library].names()}
    if not slash:
        known |= {other: other for other in _BUILDERS}
    hint = (
        did_you_mean(known[match] for match in near(rest, known))
        or " `dia-lightning models`, list_models() in Python, has all names."
    )
    return f"Unknown model {name!r}.{hint}"
