"""Which layers of a network attention is attached to."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from dia_lightning.attention._attached_block import AttachedBlock
from dia_lightning.attention._examples import known_examples
from dia_lightning.attention._found_sites import branch_sites, measured
from dia_lightning.attention._named_sites import (
    block_around,
    container,
    named_paths,
    site_from_layer,
    sites_by_rules,
)
from dia_lightning.attention._own_attention import own_attention
from dia_lightning.attention._site_table import BlockRule, is_optional, rule_of
from dia_lightning.attention._sites import (
    Branch,
    LeftOut,
    Site,
    Stages,
    in_stages,
    numbered_around,
    possible_sites,
    size_and_lane,
)
from dia_lightning.attention._trace import Run, trace

Patterns: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool]
#: A pattern of module paths, several, a function of path and module, or a list of these per group that shares a unit.
Sites: TypeAlias = Patterns | Sequence[Patterns]

Existing: TypeAlias = Literal["keep", "replace", "share"]


@dataclass(frozen=True)
class Place:
    """Sites of a block that are plugged together.

    They are all sites of the block or, of a module whose forward runs several layers by itself, those of one layer.
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
        """Width and, if they are known, positions, for messages."""
        positions = "x".join(map(str, self.sites[0].resolution))
        return f"{self.channels} channels{f', {positions} positions' if positions else ''}"

    def inside(self, site: Site) -> str:
        """Return the path of a site from the block."""
        return site.path.removeprefix(f"{self.path}.") if self.path else site.path

    @property
    def spatial_dims(self) -> int:
        """Number of position axes: 3 in blocks of volumes or video, else 2; tokens are a plane of width one."""
        shape = self.sites[0].shape
        if shape is not None:
            return 3 if len(shape) == 5 else 2
        return 3 if any("3d" in type(module).__name__ for module in self.block.modules()) else 2


def find_sites(model: nn.Module, example: Any = None, *, branches: Sequence[Branch] | None = None) -> Stages:
    """Find the layers that end the residual branches of a network, by running a copy of it once.

    Args:
        model: the network. Its weights, buffers, mode and the state of random generators stay as they are.
        example: what its forward takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments. They
            may be on the meta device. Networks of this package, torchvision, timm, diffusers and transformers, and
            modules with ``example_input_array``, need none.
        branches: which branches; as for :func:`attach`.

    Returns:
        A list of stages, each a list of :class:`Site`: blocks that follow one another with equal width and equally many
        positions. Its ``left_out`` has the other additions with the reason; printing it gives a table.

    Raises:
        ValueError: if the network does not run on the example, or an example is needed.

    Example:
        >>> import torchvision
        >>> stages = find_sites(torchvision.models.resnet18())
        >>> [len(stage) for stage in stages], stages[0][0].path, stages[0][0].channels
        ([2, 2, 2, 2], 'layer1.0.bn2', 64)
    """
    _check_branches(branches)
    refuse_unfit(model)
    networks, left_out = _run(model, example, branch_sites)
    networks = [_by_rules(model, sites) for sites in networks]
    every = [site for sites in networks for site in sites]
    chosen = {site for site in every if _is_chosen(model, site, branches)}
    if branches is None:
        chosen = chosen or set(every)
    left_out += [
        LeftOut(site.block, f"its branch is of the kind {site.branch!r}, which `branches` does not name")
        for site in every
        if site not in chosen
    ]
    return Stages(
        [stage for sites in networks for stage in in_stages(filter(chosen.__contains__, sites), size_and_lane)],
        left_out,
    )


def refuse_unfit(model: nn.Module) -> None:
    """Refuse what is no network, has attention, or is wrapped by something that would not see it.

    Raises:
        ValueError: if it is.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {model!r}. Make named networks with get_model(name).")
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule", "ScriptModule")
    for name, module in model.named_modules():
        if isinstance(module, AttachedBlock):
            raise ValueError("Attention is attached to this network already. Call detach(model) first.")
        bases = [base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")]
        wrapper = next((base for base in bases if base in wrappers), None)
        if wrapper is not None or module._compiled_call_impl is not None:
            raise ValueError(
                f"{type(module).__name__} at {name or 'the root'} is wrapped already "
                f"({wrapper or 'compile()'}), which would miss the attention's parameters or keep running code without "
                "it. Attach before the network is wrapped, sharded or compiled."
            )


def needs_example(model: nn.Module) -> bool:
    """Tell whether neither the blocks of a network are known nor what it takes."""
    return not sites_by_rules(model) and not any(True for _ in known_examples(model))


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
        ValueError: if there are none, or an argument does not fit.
    """
    if existing == "replace":
        if branches is not None or sites is not None:
            raise ValueError(
                "existing='replace' puts units where the network has its own: leave branches and sites out."
            )
        return _places(model, own_stages(model, example), with_rules=False)
    if sites is not None:
        if branches is not None:
            raise ValueError("branches and sites exclude each other: sites name the ends of branches themselves.")
        return _places(model, _named(model, sites, example), with_rules=False)
    _check_branches(branches)
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


def _check_branches(branches: Sequence[Branch] | None) -> None:
    for branch in [branches] if isinstance(branches, str) else branches or ():
        if isinstance(branches, str) or branch not in get_args(Branch):
            known = ", ".join(map(repr, get_args(Branch)))
            raise ValueError(f"branches takes a list of {known}, got {branch!r}.")


def _is_chosen(model: nn.Module, site: Site, branches: Sequence[Branch] | None) -> bool:
    return not is_optional(model.get_submodule(site.block)) if branches is None else site.branch in branches


def own_stages(model: nn.Module, example: Any, size: Callable[[Site], Any] = size_and_lane) -> Stages:
    """Return the attention modules that a network has of its own, stage by stage.

    Args:
        model: the network.
        example: what its forward takes; as for :func:`find_sites`.
        size: what the modules of a stage have in common.

    Raises:
        ValueError: if there are none, or the network cannot be run.
    """
    networks, left_out = _run(model, example, own_attention)
    stages = Stages([stage for sites in networks for stage in in_stages(sites, size)], left_out)
    if not stages:
        others = "".join(f" {other.block}: {other.reason}." for other in left_out[:3])
        raise ValueError(f"{type(model).__name__} has no attention modules of its own.{others}")
    return stages


def _run(
    model: nn.Module, example: Any, read: Callable[[Run, Run], tuple[list[Site], list[LeftOut]]]
) -> tuple[list[list[Site]], list[LeftOut]]:
    """Return what is read from runs of a network, or of each network of a library in it, and what is left out."""
    if example is not None:
        sites, left_out = read(*trace(model, example))
        return [sites], left_out
    found: list[list[Site]] = []
    left_out, refused = [], ""
    for path, module, examples in known_examples(model):
        # meta tensors first; not every network runs on them
        for candidate, only_on_meta in [*zip(examples, repeat(True)), *zip(examples, repeat(False))]:
            try:
                sites, others = read(*trace(module, candidate, only_on_meta=only_on_meta))
            except ValueError as error:
                refused = refused or f" {error}"
                continue
            found.append([replace(site, path=_join(path, site.path), block=_join(path, site.block)) for site in sites])
            left_out += [replace(other, block=_join(path, other.block)) for other in others]
            if path:
                left_out.append(LeftOut("", f"of this network only {path!r} was run: give an example for the rest"))
            break
        else:
            left_out.append(LeftOut(path, refused.strip()))
    if not found:
        what = "residual block" if read is branch_sites else "attention module of its own"
        hint = "Or name the layers that end its branches, as in sites=['blocks.*.conv2']. Modules that could be sites: "
        raise ValueError(
            f"No {what} is known in {type(model).__name__}, and to find some by running it, what it takes must be "
            "known. Give `example`: a tensor, a tuple of positional arguments or a dict of keyword arguments of its "
            "forward, as in example=torch.zeros(1, 3, 224, 224)."
            f"{f' {hint}{possible_sites(model)}.' if read is branch_sites else ''}{refused}"
        )
    return found, left_out


def _places(model: nn.Module, stages: Sequence[list[Site]], *, with_rules: bool) -> list[list[Place]]:
    """Group the sites of each layer of the stages."""
    per_block = Counter(site.block for stage in stages for site in stage)
    result: list[list[Place]] = []
    for stage in stages:
        grouped: dict[tuple[str, str | None], list[Site]] = {}
        for site in stage:
            number = numbered_around(site.path, [other.path for other in stage if other.block == site.block])
            inside = number is not None and len(number) > len(site.block)
            grouped.setdefault((site.block, number if inside else None), []).append(site)
        result.append([])
        for (path, _), sites in grouped.items():
            block = model.get_submodule(path)
            rule = (rule_of(block)[0] if with_rules else None) or BlockRule("")
            result[-1].append(Place(block, tuple(sites), rule, per_block[path] == 1))
    return result


def _by_rules(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Move the sites of blocks that have a rule to where the rule says."""
    moved: dict[tuple[str, str], Site] = {}
    for site in sites:
        rule, _ = rule_of(model.get_submodule(site.block))
        path = site.path if rule is None else _join(site.block, rule.site)
        moved.setdefault((site.block, path), replace(site, path=path, before=site.before and rule is None))
    return list(moved.values())


def _named(model: nn.Module, sites: Sites, example: Any) -> list[list[Site]]:
    groups, are_explicit = _groups(sites)
    paths = [named_paths(model, group) for group in groups]
    twice = [path for number, group in enumerate(paths) for path in group for other in paths[:number] if path in other]
    if twice:
        raise ValueError(f"sites: {twice[0]!r} is in two groups. A layer takes part in one.")
    blocks = {path: block_around(model, path, group) for group in paths for path in group}
    runs = _runs(model, example)
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


def _runs(model: nn.Module, example: Any) -> tuple[Run, Run] | None:
    """Return runs of a network on an example, or on one that is known for it; ``None`` if there is none."""
    if example is not None:
        return trace(model, example)
    for path, _, examples in known_examples(model):
        for candidate in examples if not path else ():
            try:
                return trace(model, candidate, only_on_meta=True)
            except ValueError:
                continue
    return None


def _groups(sites: Any) -> tuple[list[Any], bool]:
    """Return the patterns of each group that shares a unit and true; or one list of all, and false."""
    if isinstance(sites, str) or (callable(sites) and not isinstance(sites, type)):
        return [[sites] if isinstance(sites, str) else sites], False
    if not sites:
        raise ValueError("sites names no module. Give patterns such as ['encoder.*.conv2'], or leave it out.")
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


def _join(path: str, inner: str) -> str:
    return f"{path}.{inner}".strip(".")


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
    """Return the places of attention modules that a network has of its own and that can be one, stage by stage.

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
            f"existing='share': no two attention modules of {type(model).__name__} that follow one another have "
            "weights of the same shapes."
        )
    return _places(model, stages, with_rules=False)
