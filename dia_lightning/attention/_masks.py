"""Which blocks get attention."""

from collections.abc import Sequence

#: Masks that the authors of EAN found for a ResNet50 by search; use them as ``plug``.
#: Source: Huang et al., "Efficient Attention Network", arXiv 2011.14058, and the code of its authors.
EAN_MASKS = {
    "ean-dia-resnet50": "110|0011|110010|011",
    "ean-sge-resnet50": "100|1011|010011|011",
}


def plugged(plug: str | Sequence[bool | int] | None, counts: Sequence[int]) -> list[bool]:
    """Return one boolean per block.

    Args:
        plug: a mask, as for :func:`attach`; ``None`` for every block.
        counts: number of blocks per stage.

    Raises:
        ValueError: if the mask does not fit.
    """
    blocks = sum(counts)
    if plug is None:
        return [True] * blocks
    if isinstance(plug, bool) or not isinstance(plug, Sequence):
        raise ValueError(f"plug takes one boolean per block, or a string such as '110|0011', got {plug!r}.")
    if isinstance(plug, str):
        plug = EAN_MASKS.get(plug, plug).replace(" ", "").replace(",", "")
        found = [len(part) for part in plug.split("|")]
        if len(found) > 1 and found != list(counts):
            raise ValueError(f"plug {plug!r} has stages of {_sum(found)} blocks, but the network has {_sum(counts)}.")
    values = [value for value in plug if value != "|"]
    wrong = [value for value in values if value not in ("0", "1", 0, 1)]
    if wrong:
        names = ", ".join(EAN_MASKS)
        given = f"{wrong[0]!r} in {plug!r}" if isinstance(plug, str) else repr(wrong[0])
        raise ValueError(f"plug takes 0 and 1 (or False and True), one per block, or one of {names}; got {given}.")
    if len(values) != blocks:
        raise ValueError(f"plug has {len(values)} entries, but the network has {blocks} blocks ({_sum(counts)}).")
    mask = [bool(int(value)) for value in values]
    if not any(mask):
        raise ValueError("plug leaves every block without attention. Do not attach any, or plug at least one block.")
    return mask


def _sum(counts: Sequence[int]) -> str:
    return "+".join(map(str, counts))
