"""Where attention is attached, and how many parameters it has there."""

from collections import Counter

from torch import nn

from dia_lightning.attention._attached_block import AttachedBlock
from dia_lightning.attention._links import Slot
from dia_lightning.attention._sites import LeftOut, Site
from dia_lightning.attention._stages import Stages


def attached_stages(network: nn.Module, found: Stages) -> tuple[Stages, list[int]]:
    """Return the stages that attention is attached to, and the number of parameters that it adds to each.

    Args:
        network: any network, with attention or without.
        found: the sites of the same network without attention, which tell positions and kinds of branches.
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


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
