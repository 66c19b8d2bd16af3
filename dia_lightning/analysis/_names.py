"""How stages and their layers are called in tables and pictures."""

from collections.abc import Sequence
from itertools import takewhile


def stage_title(stage: int, layers: Sequence[str]) -> str:
    """Return the number of a stage and the container that its sites have in common; of one site its block.

    Args:
        stage: its number.
        layers: names of the sites.

    Example:
        >>> stage_title(1, ["layer2.0.bn2", "layer2.1.bn2"])
        'stage 1 (layer2)'
        >>> stage_title(1, ["layer2.0.bn2"])
        'stage 1 (layer2.0)'
        >>> stage_title(0, ["0.end", "1.end"])
        'stage 0'
    """
    parts = zip(*(name.split(".")[:-1] for name in layers), strict=False)
    common = ".".join(same[0] for same in takewhile(lambda names: len(set(names)) == 1, parts))
    return f"stage {stage} ({common})" if common else f"stage {stage}"
