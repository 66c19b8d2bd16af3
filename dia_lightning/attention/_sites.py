"""What a site is, and how the sites of a network are found."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from torch import Tensor, nn

#: ``"conv"``: the only branch of a convolutional block; ``"attention"`` and ``"mlp"``: those of a transformer block.
Branch = Literal["conv", "attention", "mlp"]


@dataclass(frozen=True)
class Site:
    """Where a residual branch of a block ends, just before the addition.

    Args:
        path: the submodule, from the block.
        before: whether the submodule's input ends the branch, and not its output.
        channels_last: whether channels are the last dimension there (``[B, H, W, C]``, ``[B, N, C]``), not the second.
        branch: which branch of the block ends here.
        optional: whether the site is left out unless its branch is asked for or the network has no other sites.
    """

    path: str
    before: bool = False
    channels_last: bool = False
    branch: Branch = "conv"
    optional: bool = False


@dataclass(frozen=True)
class BlockRule:
    """Where the residual branches of a block class end.

    Args:
        sites: the sites in the order in which they run, or a function from a block to them; none for a block without
            shortcut.
        width: submodule that tells the number of channels; by default that of the first site.
        branch_norm: whether the branch ends without a norm, so that attaching adds one. DIANet's authors do this in
            their pre-activation networks (``bn_additional``).
        zero_bias: whether linear layers of the unit start with a zero bias, as they do in the authors' network.
    """

    sites: tuple[Site, ...] | Callable[[Any], tuple[Site, ...]]
    width: str | None = None
    branch_norm: bool = False
    zero_bias: bool = False


@dataclass(frozen=True)
class Place:
    """A block of a network that attention can be attached to."""

    path: str  # of the block, from the root of the network
    block: nn.Module
    sites: tuple[Site, ...]
    channels: int
    branch_norm: bool = False
    zero_bias: bool = False
    stream: int | None = None  # number of the parameter of the block's forward that is the shortcut, if it is known

    @property
    def spatial_dims(self) -> int:
        """Number of position axes: 3 in blocks of volumes or video, else 2; tokens are a plane of width one."""
        return 3 if any("3d" in type(module).__name__ for module in self.block.modules()) else 2

    def batch_axis(self, site: Site) -> int:
        """Return the axis of the samples in the features of a site.

        Raises:
            ValueError: if the block has layers that take tokens first, and may or may not transpose for them.
        """
        layer = self.block.get_submodule(site.path)
        torchs = isinstance(self.block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        first = getattr(self.block.self_attn if torchs else layer, "batch_first", None)
        if not site.channels_last or first is not None:
            return 1 if site.channels_last and first is False else 0
        for path, module in self.block.named_modules():
            if getattr(module, "batch_first", None) is False:
                raise ValueError(
                    f"sites: whether samples or tokens come first at {self.path}.{site.path} is not known, because "
                    f"{path!r} takes tokens first. Build that with batch_first=True, or name it as the site."
                )
        return 0


def find_places(model: nn.Module, rules: dict[str, BlockRule], branches: Sequence[Branch] | None) -> list[list[Place]]:
    """Find the blocks of a network that have a rule, stage by stage.

    Blocks that follow one another in one container with one width form a stage; a block without shortcut ends it.

    Args:
        model: the network.
        rules: qualified name of a block class -> its rule. Subclasses follow the rule of their nearest base class.
        branches: which branches to attach to; by default all that are not optional.
    """
    if branches is not None:
        return _find_places(model, rules, lambda site: site.branch in branches)
    stages = _find_places(model, rules, lambda site: not site.optional)
    return stages if stages else _find_places(model, rules, lambda site: True)


def _find_places(model: nn.Module, rules: dict[str, BlockRule], is_chosen: Callable[[Site], bool]) -> list[list[Place]]:
    stages: list[list[Place]] = []
    open_stage: tuple[str, int] | None = None
    inside = ""  # a block whose own rule decided, so that blocks inside it are not looked at
    for path, module in model.named_modules():
        rule, known = _rule(type(module), rules)
        if rule is None or (inside and path.startswith(inside)):
            continue
        sites = rule.sites if isinstance(rule.sites, tuple) else rule.sites(module)
        chosen = tuple(filter(is_chosen, sites))
        if not chosen:
            open_stage = None
            continue
        inside = f"{path}." if path else ""
        channels = width(module.get_submodule(rule.width if rule.width is not None else chosen[0].path), path)
        stream = _stream(module, known)
        place = Place(path, module, chosen, channels, rule.branch_norm, rule.zero_bias, stream)
        stage = (_container(path), channels)
        if stage != open_stage:
            stages.append([])
        stages[-1].append(place)
        open_stage = stage
    return stages


def named_places(model: nn.Module, sites: Sequence[str] | Callable[[str, nn.Module], bool]) -> list[list[Place]]:
    """Find the sites that a user names.

    The block of a site is the module around it that is repeated: where paths of sites differ in a number, the number
    belongs to the block. Around a site that is not repeated it is the nearest module that is no plain container. Sites
    are taken to run in the order in which they are registered.

    Args:
        model: the network.
        sites: patterns of module paths such as ``"encoder.*.conv2"``, or a function of path and module that chooses.

    Raises:
        ValueError: if a pattern matches nothing, a layer cannot be a site, or sites of different widths lie in one
            block.
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
    by_block: dict[str, list[str]] = {}
    for path in found:
        by_block.setdefault(_block_around(path, found, modules), []).append(path)
    stages: list[list[Place]] = []
    for block, paths in by_block.items():
        widths = {path: width(modules[path], path) for path in paths}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{path} ({channels})" for path, channels in widths.items())
            raise ValueError(f"sites: one block cannot share one unit among different widths: {listed}.")
        prefix = f"{block}." if block else ""
        ends_here = tuple(
            Site(path.removeprefix(prefix), channels_last=_has_channels_last(modules[path])) for path in paths
        )
        place = Place(block, modules[block], ends_here, widths[paths[0]], stream=_stream(modules[block]))
        previous = stages[-1][-1] if stages else None
        if previous is None or _container(previous.path) != _container(block) or previous.channels != place.channels:
            stages.append([])
        stages[-1].append(place)
    return stages


def possible_sites(model: nn.Module) -> str:
    """List the paths of the layers whose number of channels is known."""
    paths = [path for path, module in model.named_modules() if path and _width(module) is not None]
    return ", ".join(paths[:20] or ["none"]) + (f" and {len(paths) - 20} more" if len(paths) > 20 else "")


def width(module: nn.Module, path: str) -> int:
    """Return the number of channels that a module puts out.

    Raises:
        ValueError: if the module does not tell.
    """
    channels = _width(module)
    if channels is None:
        raise ValueError(
            f"The width of {type(module).__name__} is unknown ({path}): it has no num_features, out_channels, "
            "out_features, normalized_shape or embed_dim. Name the last layer in it, or the one before it, as the site."
        )
    return channels


def _width(module: nn.Module) -> int | None:
    for name in ("num_features", "out_channels", "out_features", "normalized_shape", "embed_dim"):
        value = getattr(module, name, None)
        if isinstance(value, tuple) and value:
            value = value[-1]
        if isinstance(value, int):
            return value
    if type(module).__name__ == "FrozenBatchNorm2d":  # of torchvision, which this layer does without
        return len(cast(Tensor, module.weight))
    return None


def _has_channels_last(module: nn.Module) -> bool:
    """Tell where the channels of a layer lie: linear layers, layer norms and attention have them last."""
    if "2d" in type(module).__name__ or getattr(module, "data_format", None) == "channels_first":
        return False  # layer norms of convolutional networks
    return any(hasattr(module, name) for name in ("out_features", "normalized_shape", "embed_dim"))


def axes_of(module: nn.Module) -> int | None:
    """Return how many axes the features of a layer have, if its class tells."""
    kind = next((base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.nn")), "")
    return int(kind[-2]) + 2 if kind[-2:] in ("1d", "2d", "3d") and kind != "BatchNorm1d" else None


def parameters_of(block: nn.Module) -> tuple[str, ...]:
    """Return the names of what a block's forward takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(block.forward).parameters.items() if p.kind in kinds)


def _stream(block: nn.Module, known: type | None = None) -> int | None:
    """Return the number of the parameter of a block's forward that is the residual stream; ``None`` if nothing tells.

    Args:
        block: the block.
        known: the class that a rule was written for, whose forward takes the stream first.
    """
    parameters, taken = parameters_of(block), inspect.signature(block.forward).parameters
    if len(parameters) == len(taken) == 1:
        return 0
    if known is not None:
        name = next(iter(list(inspect.signature(cast(Any, known).forward).parameters)[1:]), None)
        return parameters.index(name) if name in parameters else None
    return 0 if parameters[:1] in (("hidden_states",), ("src",)) else None  # as transformers and torch name it


def _rule(block_class: type, rules: dict[str, BlockRule]) -> tuple[BlockRule | None, type]:
    """Return the rule of a class and the class that it was written for."""
    for base in block_class.__mro__:
        rule = rules.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule, base
    return None, block_class


def _container(path: str) -> str:
    return path.removesuffix("._checkpoint_wrapped_module").rpartition(".")[0]  # of torch's checkpoint_wrapper


def _block_around(path: str, found: Sequence[str], modules: dict[str, nn.Module]) -> str:
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdigit() and any(
            len(other := site.split(".")) == len(parts)
            and other[: end - 1] == parts[: end - 1]
            and other[end - 1] != parts[end - 1]
            and other[end:] == parts[end:]
            for site in found
        ):
            return ".".join(parts[:end])
    block = _container(path)
    while block and isinstance(modules[block], nn.Sequential | nn.ModuleList | nn.ModuleDict):
        block = _container(block)
    return block


def all_places(stages: Sequence[Sequence[Place]]) -> Iterator[Place]:
    """Yield the places of all stages in order."""
    for stage in stages:
        yield from stage
