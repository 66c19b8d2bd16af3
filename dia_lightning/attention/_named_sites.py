"""Sites named by the user, in networks that are not run."""

import inspect
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from dia_lightning.attention._links import parameters_of
from dia_lightning.attention._site_table import rule_of
from dia_lightning.attention._sites import Site, numbered_around, possible_sites, width


def sites_by_rules(model: nn.Module) -> list[list[Site]]:
    """Return the sites of blocks with a rule, stage by stage: blocks of one width in one container."""
    stages: list[list[Site]] = []
    open_stage, inside = None, ""
    for path, module in model.named_modules():
        rule, _ = rule_of(module)
        if rule is None or (inside and path.startswith(inside)):
            continue
        inside = f"{path}." if path else ""
        channels = width(module.get_submodule(rule.width or rule.site), path)
        site = Site(f"{inside}{rule.site}", path, channels, stream=stream_of(module))
        if (container(path), channels) != open_stage:
            stages.append([])
        stages[-1].append(site)
        open_stage = container(path), channels
    return stages


def named_paths(model: nn.Module, sites: Sequence[str] | Callable[[str, nn.Module], bool]) -> list[str]:
    """Return the paths of the layers the user named, in the order in which they are registered.

    Args:
        model: the network.
        sites: patterns of module paths such as ``"encoder.*.conv2"``, or a predicate of path and module.

    Raises:
        ValueError: if a pattern matches nothing, or a layer is never called.
    """
    modules = dict(model.named_modules())
    if callable(sites):
        found = [path for path, module in modules.items() if path and sites(path, module)]
        unmatched = [] if found else [getattr(sites, "__name__", "the function")]
    else:
        found = [path for path in modules if path and any(fnmatchcase(path, pattern) for pattern in sites)]
        unmatched = [pattern for pattern in sites if not any(fnmatchcase(path, pattern) for path in found)]
    if unmatched:
        raise ValueError(
            f"sites: {unmatched[0]!r} matches no module. Modules that could be sites: {possible_sites(model)}."
        )
    for path in found:
        if isinstance(modules[path], nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"sites: {path!r} is never called: torch's attention reads its weights. Name the module around it."
            )
    return found


def site_from_layer(model: nn.Module, path: str, block: str) -> Site:
    """Return the site at a layer, with width and axes from the layer's attributes.

    Raises:
        ValueError: if it lacks these.
    """
    layer, module = model.get_submodule(path), model.get_submodule(block)
    channels_last = _has_channels_last(layer)
    batch_axis = _batch_axis(module, layer, path) if channels_last else 0
    return Site(path, block, width(layer, path), -1 if channels_last else 1, batch_axis, stream=stream_of(module))


def block_around(model: nn.Module, path: str, others: Sequence[str]) -> str:
    """Return the path of the repeated module around a layer, or else of the nearest one that is not a container."""
    numbered = numbered_around(path, others)
    block = container(path) if numbered is None else numbered
    never_called = (
        (nn.ModuleList, nn.ModuleDict) if numbered is not None else (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    )
    while block and isinstance(model.get_submodule(block), never_called):
        block = container(block)
    return block


def container(path: str) -> str:
    """Return the path of the module around a module."""
    return path.removesuffix("._checkpoint_wrapped_module").rpartition(".")[0]  # of torch's checkpoint_wrapper


def stream_of(block: nn.Module) -> str | None:
    """Return the name of the block's argument that is the shortcut; ``None`` if unknown."""
    parameters, taken = parameters_of(block), inspect.signature(block.forward).parameters
    if len(parameters) == len(taken) == 1:
        return parameters[0]
    rule, known = rule_of(block)
    if rule is not None:
        name = next(iter(list(inspect.signature(cast(Any, known).forward).parameters)[1:]), None)
        return name if name in parameters else None
    return parameters[0] if parameters[:1] in (("hidden_states",), ("src",)) else None  # as transformers and torch do


def _has_channels_last(module: nn.Module) -> bool:
    """Return whether a layer has its channels last, as linear layers, layer norms and attention do."""
    if "2d" in type(module).__name__ or getattr(module, "data_format", None) == "channels_first":
        return False  # layer norms of convolutional networks
    return any(hasattr(module, name) for name in ("out_features", "normalized_shape", "embed_dim"))


def _batch_axis(block: nn.Module, layer: nn.Module, path: str) -> int:
    """Return the axis of the samples where channels are last.

    Raises:
        ValueError: if the block has layers that take tokens first, for which it may or may not transpose.
    """
    torchs = isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    first = getattr(block.self_attn if torchs else layer, "batch_first", None)
    if first is not None:
        return 0 if first else 1
    for name, module in block.named_modules():
        if getattr(module, "batch_first", None) is False:
            raise ValueError(
                f"sites: it is unknown whether samples or tokens come first at {path}, because {name!r} takes tokens "
                "first. Give an `example`, build that module with batch_first=True, or name it as the site."
            )
    return 0


def axes_of_class(layer: nn.Module) -> int | None:
    """Return how many axes the features of a layer have, if its class determines that."""
    kind = next((base.__name__ for base in type(layer).__mro__ if base.__module__.startswith("torch.nn")), "")
    return int(kind[-2]) + 2 if kind[-2:] in ("1d", "2d", "3d") and kind != "BatchNorm1d" else None
