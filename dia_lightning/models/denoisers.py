"""diffusers networks that predict noise: U-Nets and diffusion transformers."""

import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

from torch import Tensor, nn

from dia_lightning._choices import check_choice
from dia_lightning._extras import require

Denoiser = Literal["unet", "ddpm_cifar10", "ddpm_256", "dit", "dit_s", "dit_b", "dit_l", "dit_xl"]

# Where diffusers' defaults differ from the TensorFlow networks of DDPM's authors.
_DDPM: dict[str, Any] = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
_UNETS: dict[str, dict[str, Any]] = {
    "unet": {},
    "ddpm_cifar10": {"block_out_channels": (128, 256, 256, 256), "attention_levels": (1,), "dropout": 0.1, **_DDPM},
    "ddpm_256": {"block_out_channels": (128, 128, 256, 256, 512, 512), "attention_levels": (4,), **_DDPM},
}
# Layers, heads and width per head: table 1 of arXiv 2212.09748.
_DITS: dict[str, dict[str, Any]] = {
    "dit": {},
    "dit_s": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "dit_b": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "dit_l": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "dit_xl": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
#: Arguments of diffusers' classes that are made here.
_MADE_HERE = {
    "self", "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "num_class_embeds",
    "class_embed_type", "num_embeds_ada_norm", "num_train_timesteps", "norm_type", "kwargs",
}  # fmt: skip


def get_denoiser(
    name: Denoiser, *, image_shape: Sequence[int], num_classes: int | None = None, **args: Any
) -> nn.Module:
    """Build a diffusers network for images of one shape, with fresh weights.

    Args:
        name: ``"unet"``, a U-Net of any size; ``"ddpm_cifar10"`` and ``"ddpm_256"``, the U-Nets of DDPM (35.7 and 113.7
            million parameters in RGB); ``"dit"``, a transformer of any size; ``"dit_s"``, ``"dit_b"``, ``"dit_l"`` and
            ``"dit_xl"``, those of DiT.
        image_shape: (C, H, W) of the images. A U-Net of n levels needs a height and width divisible by 2^(n - 1), a
            transformer square images divisible by ``patch_size``.
        num_classes: number of classes K of a conditional network, which takes labels 0..K, where K means no class;
            ``None`` for an unconditional one.
        **args: for U-Nets ``block_out_channels`` (width per level, ``(64, 128)``), ``layers_per_block`` (residual
            blocks per level, 2), ``attention_levels`` (levels with self-attention, counted from 0 at full size, none),
            ``norm_num_groups`` (by default a quarter of the smallest width, at most 32), and arguments of
            ``UNet2DModel``, for example ``dropout``; for transformers the arguments of ``DiTTransformer2DModel``:
            ``num_layers``, ``num_attention_heads``, ``attention_head_dim``, ``patch_size``, ...

    Returns:
        The network, called as ``network(images, timesteps, class_labels=labels)``; its prediction is ``.sample``.

    Raises:
        ValueError: if the name is unknown, an argument is invalid, or the network does not suit the images; the message
            names sizes that work.
        ImportError: if diffusers is not installed.

    Source:
        arXiv 2006.11239, appendix B (DDPM); arXiv 2212.09748, table 1 (DiT).

    Example:
        >>> import torch
        >>> network = get_denoiser("unet", image_shape=(1, 8, 8), num_classes=10, block_out_channels=(16, 32))
        >>> network(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]), class_labels=torch.tensor([3, 10])).sample.shape
        torch.Size([2, 1, 8, 8])
    """
    check_choice("The denoiser", name, get_args(Denoiser))
    shape = check_image_shape(image_shape)
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, or None for an unconditional network, got {num_classes}.")
    diffusers = require_diffusers()
    if name in _UNETS:
        return _unet(diffusers.UNet2DModel, name, shape, num_classes, {**_UNETS[name], **args})
    return _dit(diffusers.DiTTransformer2DModel, name, shape, num_classes, {**_DITS[name], **args})


def predict(network: nn.Module, images: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the prediction ``[B, C, H, W]`` of a diffusers network, or of one with the same interface.

    Args:
        network: called as ``network(images, timesteps)``, with ``class_labels=labels`` where there are labels; it
            returns a tensor, or an object that has it as ``sample``.
        images: noisy ones ``[B, C, H, W]``.
        timesteps: ``[B]`` int64.
        labels: ``[B]`` int64; ``None`` for an unconditional network.
    """
    if labels is None and "num_embeds_ada_norm" in getattr(network, "config", {}):
        labels = timesteps.new_zeros(len(images))  # diffusers has no DiT without labels: all images get the same class
    output = network(images, timesteps) if labels is None else network(images, timesteps, class_labels=labels)
    prediction: Tensor = getattr(output, "sample", output)
    return prediction


def keep_labels(network: nn.Module) -> nn.Module:
    """Turn off label dropout in a transformer, in place, and return it.

    In diffusers every block would drop its own labels; tasks drop them once for all blocks.
    """
    for module in network.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0  # type: ignore[assignment]
    return network


def check_image_shape(image_shape: Sequence[int] | None) -> tuple[int, int, int]:
    """Return a shape (C, H, W) as a tuple.

    Raises:
        ValueError: if it is not one.
    """
    shape = tuple(int(size) for size in image_shape or ())
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"image_shape must be (C, H, W), got {image_shape}. Data modules for classification provide it."
        )
    return shape


def require_diffusers() -> ModuleType:
    """Return the package diffusers, or say how to install it.

    Raises:
        ImportError: if it is not installed.
    """
    module: ModuleType = require("diffusers", by="Diffusion")
    return module


def _unet(
    build: type[nn.Module], name: str, shape: tuple[int, int, int], num_classes: int | None, args: dict[str, Any]
) -> nn.Module:
    args = {"block_out_channels": (64, 128), **args}
    attention_levels, groups = args.pop("attention_levels", ()), args.pop("norm_num_groups", None)
    _check_arguments(name, build, args, ("attention_levels", "norm_num_groups"))
    widths = tuple(int(width) for width in args.pop("block_out_channels"))
    _check_unet_size(name, shape, levels=len(widths))
    if not set(attention_levels) <= set(range(len(widths))):
        raise ValueError(f"attention_levels must be in 0..{len(widths) - 1}, got {list(attention_levels)}.")
    groups = min(32, max(1, min(widths) // 4)) if groups is None else groups
    if any(width % groups for width in widths):
        raise ValueError(
            f"block_out_channels must be multiples of norm_num_groups={groups}, got {list(widths)}. Give another "
            "norm_num_groups."
        )
    kinds = ["Attn" if level in attention_levels else "" for level in range(len(widths))]
    return build(
        sample_size=shape[1] if shape[1] == shape[2] else shape[1:],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=widths,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        norm_num_groups=groups,
        num_class_embeds=None if num_classes is None else num_classes + 1,
        **args,
    )


def _check_unet_size(name: str, shape: tuple[int, int, int], *, levels: int) -> None:
    factor = 2 ** (levels - 1)
    if all(size % factor == 0 for size in shape[1:]):
        return
    nearest = [sorted({size // factor * factor or factor, -(-size // factor) * factor}) for size in shape[1:]]
    fitting = [" or ".join(map(str, sizes)) for sizes in nearest]
    most = next(n for n in reversed(range(levels)) if all(size % 2**n == 0 for size in shape[1:])) + 1
    raise ValueError(
        f"{name} has {levels} levels and halves images {levels - 1} times, which needs a height and width divisible "
        f"by {factor}, got {shape[1]}x{shape[2]}. Take {fitting[0]} for the height and {fitting[1]} for the "
        f"width, or at most {most} levels (entries of block_out_channels)."
    )


def _dit(
    build: type[nn.Module], name: str, shape: tuple[int, int, int], num_classes: int | None, args: dict[str, Any]
) -> nn.Module:
    args = {"patch_size": 2, **args}
    _check_arguments(name, build, args)
    channels, height, width = shape
    patch = args["patch_size"]
    if height != width or height % patch:
        down = height // patch * patch or patch
        raise ValueError(
            f"{name} needs square images with a side divisible by patch_size={patch}, got {height}x{width}. Take "
            f"{down}x{down} or {down + patch}x{down + patch}, or another patch_size."
        )
    labels = 1 if num_classes is None else num_classes
    network = build(sample_size=height, in_channels=channels, out_channels=channels, num_embeds_ada_norm=labels, **args)
    return keep_labels(network)


def _check_arguments(name: str, build: type[nn.Module], given: dict[str, Any], own: Sequence[str] = ()) -> None:
    theirs = [argument for argument in inspect.signature(build.__init__).parameters if argument not in _MADE_HERE]
    accepted = sorted({*theirs, *own})
    for argument in given:
        if argument not in accepted:
            raise ValueError(f"{name} does not take {argument!r}. It takes: {', '.join(accepted)}.")
