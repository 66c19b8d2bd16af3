"""Which tokens of a batch are real, where a block is told so by a mask."""

from typing import Any

import torch
from torch import Tensor

from dia_lightning.attention._frame import Frame

#: Parameters that mark real tokens, by whether a mask [B, N] may be given (else it is a pattern [N, N]).
_REAL = {"attention_mask": True, "attn_mask": False, "src_mask": False}
#: Parameters that mark padding.
_PADDING = (
    "src_key_padding_mask",
    "tgt_key_padding_mask",
    "key_padding_mask",
    "padding_mask",
    "encoder_padding_mask",
    "self_attn_padding_mask",
    "pad_mask",
)


def real_tokens(frame: Frame, batch: int, tokens: int) -> Tensor | None:
    """Return [B, N], true for the tokens that are no padding; ``None`` if the block is given no mask of samples.

    Args:
        frame: of the block.
        batch: number of samples B.
        tokens: number of tokens N.

    Raises:
        RuntimeError: if a mask of samples has a name that does not tell what it marks.
    """
    args, kwargs = frame.arguments
    given: dict[str, Any] = {**dict(zip(frame.link.parameters, args, strict=False)), **kwargs}
    for name, mask in given.items():
        if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.shape[-1] != tokens or len(mask) % batch:
            continue  # none, or a pattern of attention that all samples have
        known = name in _REAL or name in _PADDING
        if known and (mask.ndim > 2 or name in _PADDING or _REAL[name]):
            return _real(mask, batch, name in _PADDING)
        if not known and "mask" in name and batch > 1 and tuple(mask.shape) in ((batch, tokens), (batch, 1, 1, tokens)):
            raise RuntimeError(
                f"Attention does not know whether {name!r} of a {type(frame.block).__name__} marks padded tokens, "
                "which must not count. Call it attention_mask (true for real tokens) or key_padding_mask (true for "
                "padding)."
            )
    return None


def _real(mask: Tensor, batch: int, marks_padding: bool) -> Tensor:
    """Read a mask [B, N], or [B, ..., N] of keys by queries and heads, or [B * heads, queries, N]."""
    if not mask.is_floating_point():
        valid = mask.bool() ^ marks_padding
    else:  # added to the logits, so -inf, the lowest number, or something like -1e4; or 1 for real tokens
        valid = torch.where(mask.amax() > 0, mask > 0.5, mask > -1e3)
    return valid if mask.ndim == 2 else valid.reshape(batch, -1, mask.shape[-1]).any(1)
