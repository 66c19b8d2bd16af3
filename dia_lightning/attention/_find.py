"""Find the sites of a network by running it on a given or known example."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, get_args

from torch import nn

from dia_lightning.attention._attached_block import AttachedBlock
from dia_lightning.attention._examples import known_examples
from dia_lightning.attention._found_sites import branch_sites
from dia_lightning.attention._graph import Run
from dia_lightning.attention._own_attention import own_attention
from dia_lightning.attention._site_table import is_optional, rule_of
from dia_lightning.attention._sites import Branch, LeftOut, Site, in_stages, possible_sites, size_and_lane
from dia_lightning.attention._stages import Stages
from dia_lightning.attention._trace import trace


def find_sites(model: nn.Module, example: Any = None, *, branches: Sequence[Branch] | None = None) -> Stages:
    """Find the layers that end the residual branches of a network, by running a copy of it once.

    Args:
        model: the network. Its weights, buffers and mode, and the state of random generators, do not change.
        example: input of its forward: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Its
            tensors may be on the meta device. Networks of this package, torchvision, timm, diffusers and transformers,
            and modules with ``example_input_array``, need none.
        branches: which branches; as for :func:`attach`.

    Returns:
        A list of stages, each a list of :class:`Site`: consecutive blocks of equal width and number of positions. Its
        ``left_out`` lists the other additions, with reasons. Printing it gives a table.

    Raises:
        ValueError: if the network does not run on the example, or needs one.

    Example:
        >>> import torchvision
        >>> stages = find_sites(torchvision.models.resnet18())
        >>> [len(stage) for stage in stages], stages[0][0].path, stages[0][0].channels
        ([2, 2, 2, 2], 'layer1.0.bn2', 64)
    """
    check_branches(branches)
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
    """Refuse anything that is not a network, has attention, or is wrapped in a way that would miss it.

    Raises:
        ValueError: if it must be refused.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {model!r}. Make named networks with get_model(name).")
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule", "ScriptModule")
    for name, module in model.named_modules():
        if isinstance(module, AttachedBlock):
            raise ValueError(
                "Attention is already attached to this network: attention_layers(model) lists where. Call "
                "detach(model) first."
            )
        bases = [base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")]
        wrapper = next((base for base in bases if base in wrappers), None)
        if wrapper is not None or module._compiled_call_impl is not None:
            raise ValueError(
                f"{type(module).__name__} at {name or 'the root'} is already wrapped "
                f"({wrapper or 'compile()'}), which would miss the attention's parameters or keep running code without "
                "it. Attach before wrapping, sharding or compiling the network."
            )


def check_branches(branches: Sequence[Branch] | None) -> None:
    """Refuse anything but a list of kinds of branches.

    Raises:
        ValueError: if it is anything else.
    """
    for branch in [branches] if isinstance(branches, str) else branches or ():
        if isinstance(branches, str) or branch not in get_args(Branch):
            known = ", ".join(map(repr, get_args(Branch)))
            raise ValueError(f"branches takes a list of {known}, got {branch!r}.")


def _is_chosen(model: nn.Module, site: Site, branches: Sequence[Branch] | None) -> bool:
    return not is_optional(model.get_submodule(site.block)) if branches is None else site.branch in branches


def own_stages(model: nn.Module, example: Any, size: Callable[[Site], Any] = size_and_lane) -> Stages:
    """Return the network's own attention modules, stage by stage.

    Args:
        model: the network.
        example: input of its forward; as for :func:`find_sites`.
        size: what the modules of a stage have in common.

    Raises:
        ValueError: if there are none, or the network does not run.
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
    """Return what ``read`` finds in runs of a network, or of each library network in it, and what is left out."""
    if example is not None:
        sites, left_out = read(*trace(model, example))
        return [sites], left_out
    found: list[list[Site]] = []
    left_out, refused = [], ""
    for path, module, examples in known_examples(model):
        try:
            sites, others = read(*_first_runs(module, examples))
        except ValueError as error:
            refused = refused or f" {error}"
            left_out.append(LeftOut(path, str(error)))
            continue
        found.append([replace(site, path=_join(path, site.path), block=_join(path, site.block)) for site in sites])
        left_out += [replace(other, block=_join(path, other.block)) for other in others]
        if path:
            left_out.append(LeftOut("", f"only {path!r} of this network was run: give an example for the rest"))
    if not found:
        what = "residual block" if read is branch_sites else "attention module of its own"
        hint = "Or name the layers that end its branches, as in sites=['blocks.*.conv2']. Modules that could be sites: "
        raise ValueError(
            f"No {what} is known in {type(model).__name__}, and finding some by running it requires an input. "
            "Give `example`: a tensor, a tuple of positional arguments or a dict of keyword arguments of its "
            "forward, as in example=torch.zeros(1, 3, 224, 224)."
            f"{f' {hint}{possible_sites(model)}.' if read is branch_sites else ''}{refused}"
        )
    return found, left_out


def known_runs(model: nn.Module, example: Any) -> tuple[Run, Run] | None:
    """Return runs of a network on an example, or on a known one; ``None`` if there is none."""
    if example is not None:
        return trace(model, example)
    path, _, examples = next(known_examples(model), ("", model, []))
    try:
        return None if path or not examples else _first_runs(model, examples)
    except ValueError:
        return None


def _first_runs(module: nn.Module, examples: Sequence[Any]) -> tuple[Run, Run]:
    """Return runs on the first example that a network accepts, on meta tensors if it runs on those with any.

    Raises:
        ValueError: if it accepts none; the error is that of the first.
    """
    refused: list[ValueError] = []
    for example, only_on_meta in [*zip(examples, repeat(True)), *zip(examples, repeat(False))]:
        try:
            return trace(module, example, only_on_meta=only_on_meta)
        except ValueError as error:
            refused.append(error)
    raise refused[0]


def _by_rules(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Move the sites of blocks with a rule to where the rule puts them."""
    moved: dict[tuple[str, str], Site] = {}
    for site in sites:
        rule, _ = rule_of(model.get_submodule(site.block))
        path = site.path if rule is None else _join(site.block, rule.site)
        moved.setdefault((site.block, path), replace(site, path=path, before=site.before and rule is None))
    return list(moved.values())


def _join(path: str, inner: str) -> str:
    return f"{path}.{inner}".strip(".")
