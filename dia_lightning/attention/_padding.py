"""Which tokens of a batch are real, where a block is told so by a mask."""

from typing import Any

import torch
from torch import Tensor

from dia_lightning.attention._running import Frame

#: Parameters that mark the real tokens, or say which tokens attend to which, in `timm` and `transformers`.
_ATTENTION = ("attn_mask", "attention_mask")
#: Parameters that mark the padding, in torch.
_PADDING = ("src_key_padding_mask", "key_padding_mask")


def real_tokens(frame: Frame, batch: int, tokens: int) -> Tensor | None:
    """Return [B, N], true for the tokens that are no padding; ``None`` if the block is given no mask of samples.

    Args:
        frame: of the block.
        batch: number of samples B.
        tokens: number of tokens N.

    Raises:
        RuntimeError: if the mask has an unknown form.
    """
    args, kwargs = frame.arguments
    given: dict[str, Any] = {**dict(zip(frame.link.parameters, args, strict=False)), **kwargs}
    for name in (*_ATTENTION, *_PADDING):
        mask = given.get(name)
        if isinstance(mask, Tensor) and mask.ndim >= 2 and mask.shape[-1] == tokens:
            valid = _real_tokens(mask, batch, name in _PADDING)
            if valid is not None:
                return valid
    return None


def _real_tokens(mask: Tensor, batch: int, marks_padding: bool) -> Tensor | None:
    """Read a mask as its library does: [B, N], or [B, H, N or 1, N] of keys by queries and heads."""
    if len(mask) != batch or mask.ndim == 3 or (mask.ndim == 2 and not marks_padding and mask.is_floating_point()):
        return None  # the same for all samples: a pattern of attention, no padding
    added = mask.is_floating_point()  # to the logits
    valid = mask > torch.finfo(mask.dtype).min / 2 if added else mask.bool() ^ marks_padding
    return valid if mask.ndim == 2 else valid.flatten(1, 2).any(1)
