"""Named choices of blocks."""

#: Masks that the authors of EAN found for a ResNet50 by search; use them as ``plug``.
#: Source: Huang et al., "Efficient Attention Network", arXiv 2011.14058, and the code of its authors.
EAN_MASKS = {
    "ean-dia-resnet50": "110|0011|110010|011",
    "ean-sge-resnet50": "100|1011|010011|011",
}
