"""Which layers of a network get attention."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from dia_lightning.attention._find import check_branches, find_sites, known_runs, own_stages
from dia_lightning.attention._found_sites import measured
from dia_lightning.attention._named_sites import (
    block_around,
    container,
    named_paths,
    site_from_layer,
    sites_by_rules,
)
from dia_lightning.attention._site_table import BlockRule, rule_of
from dia_lightning.attention._sites import (
    Branch,
    Site,
    in_layers,
    in_stages,
    possible_sites,
    size_and_lane,
)
from dia_lightning.attention._stages import Stages

Patterns: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool]
#: A pattern of module paths, several, a function of path and module, or a list of these per group that shares a unit.
Sites: TypeAlias = Patterns | Sequence[Patterns]

Existing: TypeAlias = Literal["keep", "replace", "share"]


@dataclass(frozen=True)
class Place:
    """Sites of a block that are plugged together.

    These are all sites of the block or, in a module whose forward runs several layers itself, those of one layer.
    """

    block: nn.Module
    sites: tuple[Site, ...]
    rule: BlockRule
    is_alone: bool  # whether the block has no other sites than one
    is_plugged: bool = True  # or it only hands the state on

    @property
    def path(self) -> str:
        """Path of the block in the network."""
        return self.sites[0].block

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.sites[0].channels

    @property
    def size(self) -> str:
        """Width and, if known, positions, for messages."""
        positions = "x".join(map(str, self.sites[0].resolution))
        return f"{self.channels} channels{f', {positions} positions' if positions else ''}"

    def inside(self, site: Site) -> str:
        """Return the path of a site relative to the block."""
        return site.path.removeprefix(f"{self.path}.") if self.path else site.path

    @property
    def spatial_dims(self) -> int:
        """Number of position axes: 3 in blocks of volumes or video, else 2; tokens are a plane of width one."""
        shape = self.sites[0].shape
        if shape is not None:
            return 3 if len(shape) == 5 else 2
        return 3 if any("3d" in type(module).__name__ for module in self.block.modules()) else 2


def places(
    model: nn.Module,
    *,
    example: Any,
    branches: Sequence[Branch] | None,
    sites: Sites | None,
    existing: Existing,
) -> list[list[Place]]:
    """Return the places that attention is attached to, stage by stage.

    Raises:
        ValueError: if there are none, or an argument is invalid.
    """
    if existing == "replace":
        if branches is not None or sites is not None:
            raise ValueError(
                "existing='replace' puts units where the network has its own attention: omit branches and sites."
            )
        return _places(model, own_stages(model, example), with_rules=False)
    if sites is not None:
        if branches is not None:
            raise ValueError("branches and sites exclude each other: sites already name the ends of branches.")
        return _places(model, _named(model, sites, example), with_rules=False)
    check_branches(branches)
    found = Stages(sites_by_rules(model)) if example is None else Stages()
    if found and branches is not None and "conv" not in branches:
        raise ValueError(
            f"The known residual blocks of {type(model).__name__} have branches of the kind 'conv' only; `branches` "
            f"asks for {list(branches)}. To find others, give an `example`."
        )
    if not found:
        found = find_sites(model, example, branches=branches)
    if not found:
        raise ValueError(_nothing(model, found, branches))
    return _places(model, found, with_rules=True)


def _places(model: nn.Module, stages: Sequence[list[Site]], *, with_rules: bool) -> list[list[Place]]:
    """Group the sites of each layer of the stages."""
    per_block = Counter(site.block for stage in stages for site in stage)
    result: list[list[Place]] = []
    for stage in stages:
        result.append([])
        for sites in in_layers(stage):
            path = sites[0].block
            block = model.get_submodule(path)
            rule = (rule_of(block)[0] if with_rules else None) or BlockRule("")
            result[-1].append(Place(block, tuple(sites), rule, per_block[path] == 1))
    return result


def _named(model: nn.Module, sites: Sites, example: Any) -> list[list[Site]]:
    groups, are_explicit = _groups(sites)
    paths = [named_paths(model, group) for group in groups]
    twice = [path for number, group in enumerate(paths) for path in group for other in paths[:number] if path in other]
    if twice:
        raise ValueError(f"sites: {twice[0]!r} is in two groups. Put it in one.")
    nested = [(one, two) for group in paths for one in group for two in group if two.startswith(f"{one}.")]
    if nested:
        raise ValueError(f"sites: {nested[0][1]!r} is inside {nested[0][0]!r}. Name one of them.")
    blocks = {path: block_around(model, path, group) for group in paths for path in group}
    runs = known_runs(model, example)
    if runs is None:
        found = [[site_from_layer(model, path, blocks[path]) for path in group] for group in paths]
    else:
        sites_by_path = measured(model, blocks, *runs)
        found = [[site for path, site in sites_by_path.items() if path in group] for group in paths]
    if not are_explicit:
        return in_stages(found[0], _container_and_width if runs is None else size_and_lane)
    for group in found:
        if len({site.channels for site in group}) > 1:
            listed = ", ".join(f"{site.path} ({site.channels})" for site in group)
            raise ValueError(f"sites: layers of different widths cannot share a unit: {listed}.")
    return found


def _groups(sites: Any) -> tuple[list[Any], bool]:
    """Return the patterns of each group that shares a unit, and true; or one list of all, and false."""
    if isinstance(sites, str) or (callable(sites) and not isinstance(sites, type)):
        return [[sites] if isinstance(sites, str) else sites], False
    if not sites:
        raise ValueError("sites names no module. Give patterns such as ['encoder.*.conv2'], or omit it.")
    if all(isinstance(pattern, str) for pattern in sites):
        return [list(sites)], False
    groups = [[group] if isinstance(group, str) else group for group in sites]
    for group in groups:
        is_function = callable(group) and not isinstance(group, type)
        if not is_function and not (
            isinstance(group, Sequence) and group and all(isinstance(pattern, str) for pattern in group)
        ):
            raise ValueError(
                f"sites takes patterns of module paths, such as ['encoder.*.conv2'], or a list of these per group that "
                f"shares a unit, got {sites!r}."
            )
    return groups, True


def _container_and_width(site: Site) -> tuple[str, int]:
    return container(site.block), site.channels


def _nothing(model: nn.Module, found: Stages, branches: Sequence[Branch] | None) -> str:
    which = "residual branch" if branches is None else f"residual branch of the kinds {list(branches)}"
    others = [f"{other.block or 'the network itself'}: {other.reason}" for other in found.left_out]
    reasons = (
        f"Left out: {'; '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else "It has no shortcut"
    )
    return (
        f"{type(model).__name__} has no {which} that attention can be attached to. {reasons}. Other layers can be "
        f"named, as in sites=['blocks.*.conv2']. Modules that could be sites: {possible_sites(model)}."
    )


def own_modules(model: nn.Module, example: Any) -> list[list[Place]]:
    """Return the places of the network's own attention modules that can share one, stage by stage.

    Those of a stage are of one class, with weights of the same shapes.
    """

    def kind(site: Site) -> Any:
        module = model.get_submodule(site.path)
        weights = [(tensor.shape, tensor.requires_grad) for tensor in module.state_dict(keep_vars=True).values()]
        settings = [
            sorted((name, value) for name, value in vars(part).items() if isinstance(value, bool | int | float | str))
            for part in module.modules()
        ]
        return *size_and_lane(site), type(module), repr((repr(module), weights, settings))

    stages = [stage for stage in own_stages(model, example, kind) if len(stage) > 1]
    if not stages:
        raise ValueError(
            f"existing='share': no two consecutive attention modules of {type(model).__name__} have "
            "weights of the same shapes."
        )
    return _places(model, stages, with_rules=False)
