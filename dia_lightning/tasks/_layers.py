"""Layers of a network, as layer-wise learning-rate decay counts them, and its head."""

from collections.abc import Iterator, Set

from torch import nn

from dia_lightning.attention import plain_class
from dia_lightning.tasks._head import classifiers

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layers(network: nn.Module, left_out: Set[nn.Parameter] = frozenset()) -> list[list[nn.Parameter]]:
    """Return the parameters of each layer, from input to output, in order of registration.

    A layer is a block where blocks of one class follow one another; otherwise it is an item of a list, such as a
    ``Sequential``, or a child of the network. Norms and loose parameters, such as a class token, belong to the layer
    before them, or to the first layer if there is none.

    Args:
        network: any network.
        left_out: parameters that belong to no layer.
    """
    found: list[list[nn.Parameter]] = [[]]
    is_open = True  # until the first layer has a matrix
    seen = set(left_out)
    for parameters, is_loose in _parts(network, left_out):
        own = [parameter for parameter in parameters if parameter not in seen]
        seen.update(own)
        has_matrix = not is_loose and any(parameter.ndim > 1 for parameter in own)
        if has_matrix and not is_open:
            found.append([])
        is_open = is_open and not has_matrix
        found[-1] += own
    return found


def head_of(network: nn.Module, left_out: Set[nn.Parameter] = frozenset()) -> list[nn.Parameter]:
    """Return the parameters of a network's last layer or layers, except those left out."""
    return [parameter for module in classifiers(network, left_out) for parameter in module.parameters()]


def _parts(module: nn.Module, left_out: Set[nn.Parameter]) -> Iterator[tuple[list[nn.Parameter], bool]]:
    """Yield the parameters of layers and of what belongs to one, and whether they are loose."""
    yield list(module.parameters(recurse=False)), True
    for child in module.children():
        if isinstance(child, _LISTS) or any(_is_of_blocks(inner, left_out) for inner in child.modules()):
            yield from _parts(child, left_out)
        else:
            yield list(child.parameters()), False


def _is_of_blocks(module: nn.Module, left_out: Set[nn.Parameter]) -> bool:
    """Return whether a module is a list of several blocks of one class, each with two or more matrices."""
    if not isinstance(module, _LISTS):
        return False
    items = [child for child in module.children() if any(each not in left_out for each in child.parameters())]
    is_block = [not isinstance(item, _LISTS) and sum(each.ndim > 1 for each in item.parameters()) > 1 for item in items]
    return len(items) > 1 and all(is_block) and len({plain_class(item) for item in items}) == 1
