"""Classification networks of torchvision and timm, imported on demand.

Used by ``get_model``, and by tasks and the command line to find out what a name or its arguments would read.
"""

import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

from torch import nn

from dia_lightning._extras import require
from dia_lightning.models._build_on_meta import build_on_meta


class Library(Protocol):
    """Another library's networks."""

    def names(self) -> list[str]:
        """Return the sorted names; none where the library is not installed."""

    def has(self, name: str) -> bool:
        """Return whether ``build`` knows the name."""

    def build(self, name: str, args: dict[str, Any]) -> nn.Module:
        """Build the network."""


#: Heads that make the output a tuple in training; networks are built without them unless requested.
_AUXILIARY_HEADS = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


class Torchvision:
    """Networks of ``torchvision.models``, without weights by default."""

    def names(self) -> list[str]:
        models = _torchvision_models()
        return list(models.list_models(module=models))  # excluding the detection, segmentation and video networks

    def has(self, name: str) -> bool:
        return name in self.names()

    def build(self, name: str, args: dict[str, Any]) -> nn.Module:
        models = _torchvision_models()
        options = {"weights": None, **args}
        if name in _AUXILIARY_HEADS:
            options.setdefault("aux_logits", False)
        if options["weights"] is None:
            return _call(f"torchvision/{name}", models.get_model, name, options)

        num_classes = options.pop("num_classes", None)
        known = models.get_model_weights(name)
        if isinstance(options["weights"], str):
            short = options["weights"].removeprefix(f"{known.__name__}.")
            if short not in known.__members__:
                members = ", ".join(known.__members__)
                raise ValueError(f"torchvision/{name} has no weights {short!r}. Available: {members}.")
            options["weights"] = known[short]
        if name in _AUXILIARY_HEADS and not options["aux_logits"]:
            del options["aux_logits"]  # loading weights needs these heads: torchvision refuses False
        model = _call(f"torchvision/{name}", models.get_model, name, options)
        heads = [model]
        for auxiliary in _AUXILIARY_HEADS.get(name, ()):
            if "aux_logits" in options:
                heads.append(model.get_submodule(auxiliary))
            else:
                model.register_module(auxiliary, None)
                model.aux_logits = False  # type: ignore[assignment]
        if num_classes is not None and num_classes != len(options["weights"].meta["categories"]):
            for head in heads:
                replace_head(head, num_classes)
        return model


class Timm:
    """Networks of timm, an optional dependency."""

    def names(self) -> list[str]:
        if find_spec("timm") is None:
            return []
        import timm

        return list(timm.list_models())

    def has(self, name: str) -> bool:
        timm = require("timm", by=f"timm/{name}")

        return ":" in name or timm.is_model(name)  # hf-hub:NAME and local-dir:PATH are resolved by timm itself

    def build(self, name: str, args: dict[str, Any]) -> nn.Module:
        import timm

        return _call(f"timm/{name}", timm.create_model, name, args)


def _torchvision_models() -> Any:
    import dia_lightning._torchvision_guard  # noqa: F401  # first, so that a pair that does not fit is one line

    # isort: split
    import torchvision

    return torchvision.models


LIBRARIES: dict[str, Library] = {"torchvision": Torchvision(), "timm": Timm()}


def is_elsewhere(name: object) -> bool:
    """Return whether a name makes a library read a folder or repository: ``timm/hf-hub:NAME``, ``timm/local-dir:PATH``.

    Such a name is not accepted from an untrusted file.
    """
    return isinstance(name, str) and ":" in name.partition("/")[2]


def without_weights(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return arguments that build the same network with fresh weights, without reading or downloading anything."""
    weights = args.get("weights")
    loading = ("weights", "weights_backbone", "pretrained", "checkpoint_path")
    kept = {argument: value for argument, value in args.items() if argument not in loading}
    prefix, _, rest = name.partition("/")
    if prefix == "torchvision" and isinstance(weights, str) and LIBRARIES[prefix].has(rest):
        if rest.startswith("vit_"):  # in torchvision, weights also determine what follows
            known = _torchvision_models().get_model_weights(rest).__members__
            chosen = known.get(weights.rpartition(".")[2], known["DEFAULT"])
            kept.setdefault("image_size", chosen.meta["min_size"][0])
        if rest in _AUXILIARY_HEADS:
            kept.setdefault("transform_input", True)
    return kept


def replace_head(model: nn.Module, num_classes: int) -> None:
    """Replace the classifier, the last linear or convolutional layer, with a fresh one for the same input."""
    path, head = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    bias = head.bias is not None
    fresh = (
        nn.Linear(head.in_features, num_classes, bias=bias)
        if isinstance(head, nn.Linear)
        else nn.Conv2d(head.in_channels, num_classes, kernel_size=1, bias=bias)
    )
    model.set_submodule(path, fresh)


def _call(full_name: str, build: Callable[..., nn.Module], name: str, args: dict[str, Any]) -> nn.Module:
    try:
        return build(name, **args)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        accepted = ", ".join(_options(build, name))
        raise ValueError(f"{full_name}: {error}. Besides the options of its library it takes: {accepted}.") from error
    except AssertionError as error:  # timm's have no text
        raise ValueError(
            f"{full_name} cannot be built with {args}: {str(error) or 'an assertion of its library fails'}. Omit "
            "options of other networks; --model.backbone_args null clears those of a config."
        ) from error


def _options(build: Callable[..., nn.Module], name: str) -> list[str]:
    """Return the arguments of a network, from the class that is built, because builders accept any keyword."""
    model = build_on_meta(partial(build, name))
    parameters = inspect.signature(type(model).__init__).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
