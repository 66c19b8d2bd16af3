"""Small networks of torchvision, timm and diffusers that together cover every block class of the site table."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from dia_lightning.models import get_model

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def images(size: int, channels: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, channels, size, size, generator=generator),), {}


def unet() -> nn.Module:
    network: nn.Module = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return network


def conditional_unet() -> nn.Module:
    network: nn.Module = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return network


def dit() -> nn.Module:
    network: nn.Module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        sample_size=16,
        in_channels=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return network


def diffusion(channels: int) -> Inputs:
    (noisy,), _ = images(16, channels)
    return (noisy, torch.tensor([3, 7])), {}


def conditional(channels: int) -> Inputs:
    args, _ = diffusion(channels)
    return (*args, torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))), {}


def labelled(channels: int) -> Inputs:
    args, _ = diffusion(channels)
    return args[:1], {"timestep": args[1], "class_labels": torch.tensor([1, 2])}


def vision_transformer() -> nn.Module:
    network: nn.Module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    return network


def swin(version: int) -> nn.Module:
    block = torchvision.models.swin_transformer
    network: nn.Module = torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=10,
        block=block.SwinTransformerBlock if version == 1 else block.SwinTransformerBlockV2,
        downsample_layer=block.PatchMerging if version == 1 else block.PatchMergingV2,
    )
    return network


def from_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=10, **options)


def from_registry(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(get_model, name, num_classes=10, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "cifar_resnet, basic": (from_registry("cifar_resnet", depth=20, block="basic"), images(16)),
    "cifar_resnet": (from_registry("cifar_resnet", depth=20), images(16)),
    "cifar_preresnet, basic": (from_registry("cifar_preresnet", depth=20, block="basic"), images(16)),
    "cifar_preresnet": (from_registry("cifar_preresnet", depth=20), images(16)),
    "cifar_wrn": (from_registry("cifar_wrn", depth=16, widen_factor=1), images(16)),
    "cifar_resnext": (from_registry("cifar_resnext", depth=20, cardinality=2, base_width=8), images(16)),
    "torchvision resnet18": (from_registry("torchvision/resnet18"), images(64)),
    "torchvision resnext50": (from_registry("torchvision/resnext50_32x4d"), images(64)),
    "torchvision regnet": (from_registry("torchvision/regnet_y_400mf"), images(64)),
    "torchvision convnext": (from_registry("torchvision/convnext_tiny"), images(64)),
    "torchvision efficientnet": (from_registry("torchvision/efficientnet_b0"), images(64)),
    "torchvision efficientnet v2": (from_registry("torchvision/efficientnet_v2_s"), images(64)),
    "torchvision mobilenet v2": (from_registry("torchvision/mobilenet_v2"), images(64)),
    "torchvision mobilenet v3": (from_registry("torchvision/mobilenet_v3_large"), images(64)),
    "torchvision vit": (vision_transformer, images(32)),
    "torchvision swin": (lambda: swin(1), images(32)),
    "torchvision swin v2": (lambda: swin(2), images(32)),
    "timm resnet18": (from_timm("resnet18"), images(64)),
    "timm seresnet50": (from_timm("seresnet50"), images(64)),
    "timm vit": (
        from_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=32, num_heads=2),
        images(32),
    ),
    "timm deit3": (from_timm("deit3_small_patch16_224", img_size=32, depth=3, embed_dim=32, num_heads=2), images(32)),
    "timm swin": (
        from_timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
        ),
        images(32),
    ),
    "timm swin v2": (
        from_timm("swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
        images(32),
    ),
    "timm convnext": (from_timm("convnext_atto"), images(64)),
    "timm convnext, linear mlp": (from_timm("convnext_tiny", depths=(2, 2, 1, 1), dims=(16, 32, 32, 64)), images(64)),
    "timm efficientnet": (from_timm("efficientnet_b0"), images(64)),
    "timm efficientnet v2": (from_timm("efficientnetv2_rw_t"), images(64)),
    "timm mobilenet v4": (from_timm("mobilenetv4_conv_small"), images(64)),
    "diffusers unet": (unet, diffusion(3)),
    "diffusers conditional unet": (conditional_unet, conditional(4)),
    "diffusers dit": (dit, labelled(4)),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inputs]:
    """Return a network in evaluation mode, with norms, scales and gates far from initialization, and its inputs."""
    make, (args, kwargs) = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in (*network.named_parameters(), *network.named_buffers()):
            if "running_var" in key or not tensor.is_floating_point():
                continue
            if tensor.ndim < 2 or not tensor.any():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    args = tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)
    return network.to(dtype), (args, kwargs)


def output(network: nn.Module, inputs: Inputs) -> Tensor:
    """Return the output tensor of a network; diffusers networks wrap it."""
    args, kwargs = inputs
    value = network(*args, **kwargs)
    tensor: Tensor = value if isinstance(value, Tensor) else value.sample
    return tensor
