"""Example inputs for networks of known libraries, so that users need not give one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dia_lightning.attention._links import parameters_of

#: Image sizes to try where nothing states one.
_SIDES = (224, 32, 64, 256)
#: Config entries of diffusers that state the width of the text input.
_TEXT_WIDTHS = ("joint_attention_dim", "cross_attention_dim", "caption_channels")


def known_examples(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Yield path, module and examples to try for each library network, which may be the model or a part of it."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer in inside):
            continue
        dtype = next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), torch.float32)
        examples = [_as(dtype, example) for example in _examples(module)]
        if examples:
            inside.append(path)
            yield path, module, examples


def _as(dtype: torch.dtype, example: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, example)


def _examples(module: Any) -> Iterator[Any]:
    given = getattr(module, "example_input_array", None)  # of Lightning
    if given is not None:
        yield given
    bases = [base.__module__ for base in type(module).__mro__]
    if any(base.startswith("diffusers.") for base in bases) and hasattr(module, "config"):
        yield _for_diffusers(module)
    elif hasattr(module, "main_input_name") and hasattr(module, "config"):  # of transformers
        yield _for_transformers(module)
    elif (
        (any(base.startswith("dia_lightning.models.") for base in bases) and next(module.children(), None) is not None)
        or (any(base.startswith("timm.") for base in bases) and hasattr(module, "pretrained_cfg"))
        or (any(base.startswith("torchvision.models.") for base in bases) and _is_whole(module))
    ):
        yield from _images(module)


def _is_whole(module: nn.Module) -> bool:
    """Return whether a torchvision module is a network that takes images, rather than a block or a detector."""
    name = type(module).__name__
    if name == "IntermediateLayerGetter" or "FeatureExtractor" in name:  # the backbones of detectors
        return True
    is_detector = ".detection." in type(module).__module__
    return not is_detector and any(hasattr(module, head) for head in ("fc", "classifier", "head", "heads"))


def _images(module: Any) -> Iterator[Tensor]:
    """Yield images, or videos for 3-D convolutions, of the sizes a network may be made for."""
    first = next((layer for layer in module.modules() if hasattr(layer, "in_channels")), None)
    frames = [16] if isinstance(first, nn.Conv3d) else []
    config = getattr(module, "pretrained_cfg", None) or {}  # of timm
    told = [getattr(getattr(module, "patch_embed", None), "img_size", None), getattr(module, "image_size", None)]
    sizes: list[Any] = [*told, config.get("input_size"), *_SIDES]
    for size in sizes:
        for channels in {getattr(first, "in_channels", 3): 0, 3: 0} if size else ():
            height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
            yield torch.empty(2, channels, *frames, height, width, device="meta")


def _for_diffusers(module: Any) -> dict[str, Tensor]:
    """Return the inputs of the forward, from the names of its arguments and the config."""
    config = module.config
    size = config.get("sample_size") or 32
    height, width = (size, size) if isinstance(size, int) else size
    text = next((config[name] for name in _TEXT_WIDTHS if isinstance(config.get(name), int)), None)
    known = {
        name: torch.empty(2, config.get("in_channels") or 3, height, width) for name in ("sample", "hidden_states")
    }
    known["timestep"] = torch.zeros(2, dtype=torch.long)
    if config.get("num_class_embeds") or config.get("num_embeds_ada_norm"):
        known["class_labels"] = torch.zeros(2, dtype=torch.long)
    if text is not None:
        known["encoder_hidden_states"] = torch.empty(2, 8, text)
    if config.get("pooled_projection_dim"):
        known["pooled_projections"] = torch.empty(2, config["pooled_projection_dim"])
    return {name: known[name].to("meta") for name in parameters_of(module) if name in known}


def _for_transformers(module: Any) -> dict[str, Tensor]:
    config = getattr(module.config, "vision_config", module.config)
    if getattr(module, "main_input_name", "") != "pixel_values":
        return {"input_ids": torch.ones(2, 8, dtype=torch.long, device="meta")}
    size = getattr(config, "image_size", None) or _SIDES[0]
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return {"pixel_values": torch.empty(2, getattr(config, "num_channels", 3), height, width, device="meta")}
