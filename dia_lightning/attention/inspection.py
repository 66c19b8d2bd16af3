"""What tasks and the command line ask of a network: where attention is, what it costs there, whether inputs are known.

Users call :func:`is_attached`, :func:`find_sites` and :func:`attention_layers`.
"""

from collections import Counter

from torch import nn

from dia_lightning.attention._attached_block import AttachedBlock
from dia_lightning.attention._examples import known_examples
from dia_lightning.attention._links import Slot
from dia_lightning.attention._named_sites import sites_by_rules
from dia_lightning.attention._sites import LeftOut, Site
from dia_lightning.attention._stages import Stages


def attached_blocks(network: nn.Module) -> list[AttachedBlock]:
    """Return the blocks with attention in the order of registration, including those that only pass a state on."""
    return [module for module in network.modules() if isinstance(module, AttachedBlock)]


def attached_stages(network: nn.Module, found: Stages) -> tuple[Stages, list[int]]:
    """Return the stages that attention is attached to, and the number of parameters it adds to each.

    Args:
        network: any network, with or without attention.
        found: the sites of the same network without attention, for positions and kinds of branches.
    """
    known = {site.path: site for stage in found for site in stage}
    slots: list[tuple[Slot, Site]] = []
    added: Counter[int] = Counter()
    for path, block in network.named_modules():
        for link in block.dia_links if isinstance(block, AttachedBlock) else ():
            for slot in link.slots:
                layer = f"{path}.{slot.path}" if path else slot.path
                named = Site(layer, path, slot.channels, slot.channel_axis, slot.batch_axis, before=slot.before)
                slots.append((slot, known.pop(layer, named)))
                for norm in filter(None, (slot.branch_norm, slot.unit_norm)):
                    added[slot.stage] += _count(block.get_submodule(norm))
            if link.before is None:
                stage = next(slot.stage for other in link.chain.links for slot in other.slots)
                added[stage] += _count(block.get_submodule(link.unit))
    slots.sort(key=lambda item: item[0].layer)
    numbers = sorted({slot.stage for slot, _ in slots})
    stages = [[site for slot, site in slots if slot.stage == number] for number in numbers]
    left_out = [LeftOut(site.block, "no attention is attached here") for site in known.values()]
    return Stages(stages, [*found.left_out, *left_out]), [added[number] for number in numbers]


def parameters_saved(model: nn.Module) -> int:
    """Return the number of parameters that a network saves by sharing its own attention modules."""
    links = [(block, link) for block in attached_blocks(model) for link in block.dia_links]
    sites = Counter(link.chain for _, link in links for slot in link.slots if slot.is_whole)
    first = [(block, link) for block, link in links if link.before is None and link.chain in sites]
    sizes = {link.chain: sum(each.numel() for each in getattr(block, link.unit).parameters()) for block, link in first}
    return sum(sizes[chain] * (count - 1) for chain, count in sites.items())


def takes_what_is_known(model: nn.Module) -> bool:
    """Return whether a network, or a part of it, is of a library whose networks have known inputs."""
    return any(True for _ in known_examples(model))


def needs_example(model: nn.Module) -> bool:
    """Return whether neither the blocks nor the input of a network are known."""
    return not sites_by_rules(model) and not takes_what_is_known(model)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
