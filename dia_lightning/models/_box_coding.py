"""Boxes in full precision under autocast, where torchvision would round them to the network's precision."""

from typing import Any

from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder

from dia_lightning._float32 import at_least_float32


class FullPrecisionBoxCoder(BoxCoder):  # type: ignore[misc]  # torchvision is only partly typed
    """Decodes in float32 or better: with the 8 bits of bfloat16, a coordinate of 700 would be off by up to 2 pixels."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Return boxes from offsets to reference boxes."""
        decoded: Tensor = super().decode_single(at_least_float32(rel_codes), boxes)
        return decoded


class FullPrecisionBoxLinearCoder(BoxLinearCoder):  # type: ignore[misc]
    """The same for FCOS."""

    def decode(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Return boxes from offsets to reference boxes."""
        decoded: Tensor = super().decode(at_least_float32(rel_codes), boxes)
        return decoded


def decode_in_full_precision(detector: nn.Module) -> nn.Module:
    """Replace the box coders of a detector, in place, and return it."""
    for module in detector.modules():
        coder: Any = getattr(module, "box_coder", None)
        if type(coder) is BoxCoder:
            module.box_coder = FullPrecisionBoxCoder(coder.weights, coder.bbox_xform_clip)
        elif type(coder) is BoxLinearCoder:
            module.box_coder = FullPrecisionBoxLinearCoder(coder.normalize_by_size)
    return detector
