"""Which tokens of a batch are real, according to a block's masks."""

from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.attention._frame import Frame

#: Parameters that mark real tokens, with whether they may be a mask [B, N] (else it is a pattern [N, N]).
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
    """Return [B, N], true for tokens that are not padding; ``None`` if the block gets no per-sample mask.

    Args:
        frame: of the block.
        batch: number of samples B.
        tokens: number of tokens N.

    Raises:
        RuntimeError: if the name of a per-sample mask does not show what it marks, or the block is causal.
    """
    args, kwargs = frame.arguments
    given: dict[str, Any] = {**dict(zip(frame.link.parameters, args, strict=False)), **kwargs}
    if given.get("is_causal") is True:
        raise RuntimeError(
            f"{type(frame.block).__name__} attends to earlier tokens only (is_causal=True), but the map of a unit "
            "depends on all of them. This attention does not suit causal networks."
        )
    for name, mask in given.items():
        if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.shape[-1] != tokens or len(mask) % batch:
            continue  # no mask, or an attention pattern common to all samples
        of_samples = tuple(mask.shape) in ((batch, tokens), (batch, 1, 1, tokens)) and batch > 1
        if name in _PADDING or _REAL.get(name) or (name in _REAL and mask.ndim > 2):
            return _real(mask, batch, name in _PADDING)
        if of_samples and (mask.dtype == torch.bool or "mask" in name) and (name not in _REAL or batch != tokens):
            raise RuntimeError(
                f"Attention does not know whether {name!r} of a {type(frame.block).__name__} marks padded tokens, "
                "which must not count. Call it attention_mask (true for real tokens) or key_padding_mask (true for "
                "padding)."
            )
    return None


def mean_of_real(unit: nn.Module, features: Tensor, valid: Tensor) -> Tensor | None:
    """Return the mean [B, C] over the real tokens; ``None`` if the unit does not take a mean and all are real.

    Args:
        unit: of the chain.
        features: [B, C, N, 1].
        valid: [B, N], true for the real tokens.

    Raises:
        RuntimeError: if the unit does not take a mean and some are padding.
    """
    if not getattr(unit, "takes_mean", False):
        if not torch.compiler.is_compiling() and valid.all():
            return None
        raise RuntimeError(
            f"{type(unit).__name__} would count padded tokens, so a sample would depend on the longest one in its "
            "batch. Use a unit that needs only the mean (dia-lstm, dsu, se, eca), or batches without padding."
        )
    real = features[..., 0].masked_fill(~valid[:, None], 0)  # [B, C, N], whatever stands in the padding
    total = real.sum(2, dtype=torch.promote_types(features.dtype, torch.float32))
    return (total / valid.sum(1, keepdim=True).clamp_min(1)).to(features.dtype)


def _real(mask: Tensor, batch: int, marks_padding: bool) -> Tensor:
    """Read a mask [B, N], or [B, ..., N] of keys by queries and heads, or [B * heads, queries, N]."""
    if not mask.is_floating_point():
        valid = mask.bool() ^ marks_padding
    else:  # added to the logits, so -inf, the lowest number, or something like -1e4; or 1 for real tokens
        valid = torch.where(mask.amax() > 0, mask > 0.5, mask > -1e3)
    return valid if mask.ndim == 2 else valid.reshape(batch, -1, mask.shape[-1]).any(1)
