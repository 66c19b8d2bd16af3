"""The command ``models``: networks and attention units with their cost, without allocating their memory."""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from dia_lightning.attention import attach, attention_builder, find_sites, list_attention
from dia_lightning.models import build_on_meta, get_model, list_models, network_cost

# H is the bottleneck width at the unit's default reduction. A test compares these with the units.
FORMULAS = {
    "cbam": "2*C*H + H + C + 100, H = C/16",
    "dia-lstm": "10*C*H + 2*H + 8*C, H = C/4",
    "dsu": "8*C*H + 2*H + 6*C, H = C/4",
    "eca": "k, k = int(log2(C)/2 + 1/2), plus 1 if even",
    "se": "2*C*H + H + C, H = C/16",
    "sge": "2*min(C, 64)",
    "spa": "22*C*H + H + C, H = C/16",
    "srm": "4*C",
    "stac": "8*C*H + H + 4*C, H = C/16",
}


def run(args: Sequence[str]) -> None:
    """Print the tables.

    Args:
        args: arguments of the command, without its name.
    """
    parser = argparse.ArgumentParser("dia-lightning models", description="List networks and attention units.")
    parser.add_argument("pattern", nargs="?", help="list names that match, such as 'torchvision/resnet*'")
    parser.add_argument(
        "--sites",
        action="store_true",
        help="for each network that matches the pattern, print whether it takes attention, and how many layers of each "
        "stage; every network is built and run without memory, which takes 0.1 to 5 seconds each (docs/networks.md has "
        "one network of every family)",
    )
    parser.add_argument("--cost", nargs="+", metavar="NAME", help="what each kind of attention costs on these")
    parser.add_argument("--image_size", type=int, help="for --cost (default: 32 for this package's networks, else 224)")
    parser.add_argument("--reduction", type=int, help="for --cost: the reduction of DIA-LSTM (default: 4)")
    parser.add_argument("--repeats", type=int, default=10, help="for --cost: rounds of timing (default: 10; 0: none)")
    options = parser.parse_args(args)
    if options.sites and options.pattern is None:
        raise ValueError("--sites needs a pattern, such as 'timm/convnext*'.")
    if options.cost is not None:
        _print_costs(options.cost, options.image_size, options.reduction, options.repeats)
    elif options.pattern is not None:
        _print_matching(options.pattern, options.sites)
    else:
        _print_all()


def parameters_of(name: str, attention: str | None = None) -> int:
    """Return the number of parameters of a network, counted without allocating them.

    Args:
        name: one of :func:`~dia_lightning.models.list_models`.
        attention: name of a unit to share per stage, if any.

    Example:
        >>> parameters_of("resnet164"), parameters_of("resnet164", "dia-lstm")
        (1727284, 1946132)
    """
    return _count(_on_meta(name, attention))


def _print_all() -> None:
    own, others = _split(list_models())
    print("Networks of this package, 100 classes:\n")
    _print_own(own)
    for library in ("torchvision", "timm"):
        count = sum(name.startswith(f"{library}/") for name in others)
        if count:
            print(f"\n{count} networks of {library}: dia-lightning models '{library}/*'")
    print("\nAttention units, C channels:\n")
    sizes = [[f"{_unit_size(name, width):,}" for width in (64, 256)] for name in list_attention()]
    rows = [(name, *size, FORMULAS.get(name, "")) for name, size in zip(list_attention(), sizes, strict=True)]
    _print_table(("attention", "C = 64", "C = 256", "parameters"), rows, text_columns=(0, 3))


def takes_attention(name: str) -> str:
    """Return whether attention can be attached to a network, and the sites per stage or the reason why not.

    Args:
        name: one of :func:`~dia_lightning.models.list_models`.

    Example:
        >>> takes_attention("torchvision/resnet50")
        'yes  3+4+6+3'
    """
    try:
        stages = find_sites(_on_meta(name, None))
    except ValueError:
        return "no   it does not run on images alone: attach() needs an example"
    if stages:
        return f"yes  {'+'.join(str(len(stage)) for stage in stages)}"
    grouped = sorted(stages.reasons(), key=lambda item: -len(item[1]))
    return f"no   {grouped[0][0] if grouped else 'it has no shortcut'}"


def _print_matching(pattern: str, sites: bool) -> None:
    names = list_models(pattern)
    if not names:
        raise ValueError(f"No network matches '{pattern}'. Patterns look like 'cifar_*' or 'torchvision/resnet*'.")
    if sites:
        width = max(map(len, names))
        print(f"{'network':{width}}  attention, sites per stage")
        for name in names:
            print(f"{name:{width}}  {takes_attention(name)}", flush=True)
        return
    own, others = _split(names)
    if own:
        _print_own(own)
    if others:
        print("\n".join(others))


def _print_own(names: Sequence[str]) -> None:
    rows = [(name, f"{parameters_of(name):,}", f"{parameters_of(name, 'dia-lstm'):,}") for name in names]
    _print_table(("network", "parameters", "with dia-lstm"), rows)


def _print_costs(names: Sequence[str], image_size: int | None, reduction: int | None, repeats: int) -> None:
    rows = []
    for name in names:
        size = image_size if image_size is not None else 224 if "/" in name else 32
        images = torch.rand(1, 3, size, size)
        arguments = {} if reduction is None else {"reduction": reduction}
        for cost in network_cost(partial(get_model, name), images, repeats=repeats, **arguments):
            latency = "" if cost.latency is None else f"{cost.latency:.2f}"
            rows.append((name, cost.attention, f"{cost.parameters:,}", f"{cost.flops / 1e9:.3f}", latency))
    _print_table(("network", "attention", "parameters", "GFLOPs", "latency"), rows, text_columns=(0, 1))
    if repeats > 0:
        print("latency: one forward of one image on this CPU, relative to the network without attention")


def _on_meta(name: str, attention: str | None) -> nn.Module:
    network = build_on_meta(partial(get_model, name))
    return network if attention is None else attach(network, attention)


def _unit_size(name: str, channels: int) -> int:
    with torch.device("meta"):
        return _count(attention_builder(name, {})(channels))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    return [name for name in names if "/" not in name], [name for name in names if "/" in name]


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> None:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
