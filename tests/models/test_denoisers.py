"""Denoisers: diffusers networks for images of one shape, and one-line errors."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dia_lightning.attention import attach
from dia_lightning.models.denoisers import check_image_shape, get_denoiser, predict

UNET: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1}
DIT: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "size", "published"), [("ddpm_cifar10", 32, 35_746_307), ("ddpm_256", 256, 113_673_219)]
)
def test_the_networks_of_ddpm_are_as_large_as_the_published_ones(name: Any, size: int, published: int) -> None:
    with torch.device("meta"):
        network = get_denoiser(name, image_shape=(3, size, size))
    assert parameters_of(network) == published


def test_attention_in_the_network_of_ddpm_is_one_unit_per_resolution_of_the_way_down_and_up() -> None:
    with torch.device("meta"):
        network = attach(get_denoiser("ddpm_cifar10", image_shape=(3, 32, 32)), "dia-lstm")
    units = {name.removesuffix(".dia") for name, _ in network.named_modules() if name.endswith(".dia")}
    down = {f"down_blocks.{level}.resnets.0" for level in range(4)}  # the last one with the middle and the way up
    assert units == {*down, *(f"up_blocks.{level}.resnets.0" for level in (1, 2, 3))}


@pytest.mark.parametrize(("name", "args"), [("unet", UNET), ("dit", DIT)])
@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_prediction_has_the_shape_of_the_images(name: Any, args: Any, num_classes: int | None, channels: int) -> None:
    network = get_denoiser(name, image_shape=(channels, 8, 8), num_classes=num_classes, **args)
    labels = None if num_classes is None else torch.tensor([0, num_classes])  # the last is no class
    images = torch.randn(2, channels, 8, 8)
    assert predict(network, images, torch.tensor([0, 999]), labels).shape == images.shape


@pytest.mark.parametrize(("name", "args"), [("unet", UNET), ("dit", DIT)])
def test_a_label_above_no_class_is_not_known(name: Any, args: Any) -> None:
    network = get_denoiser(name, image_shape=(1, 8, 8), num_classes=3, **args)
    with pytest.raises(IndexError):
        predict(network, torch.randn(1, 1, 8, 8), torch.tensor([0]), torch.tensor([4]))


def test_a_transformer_drops_no_labels_of_its_own() -> None:
    torch.manual_seed(0)
    network = get_denoiser("dit", image_shape=(1, 8, 8), num_classes=3, **DIT).train()
    images, labels = torch.randn(1, 1, 8, 8).expand(64, -1, -1, -1), torch.ones(64, dtype=torch.int64)
    predictions = predict(network, images, torch.full((64,), 500), labels)
    assert torch.allclose(predictions, predictions[:1], atol=1e-6)


def test_images_need_not_be_square_in_a_unet() -> None:
    network = get_denoiser("unet", image_shape=(1, 8, 12), **UNET)
    assert predict(network, torch.randn(1, 1, 8, 12), torch.tensor([3])).shape == (1, 1, 8, 12)


def test_attention_levels_have_attention_on_the_way_down_and_up() -> None:
    network = get_denoiser("unet", image_shape=(1, 8, 8), attention_levels=[0], **UNET)
    kinds = {name.rpartition(".attentions")[0] for name, _ in network.named_modules() if ".attentions.0" in name}
    assert {kind for kind in kinds if kind} >= {"down_blocks.0", "up_blocks.1"}
    assert not {"down_blocks.1", "up_blocks.0"} & kinds


class Echo(nn.Module):
    """A custom network, which returns a tensor."""

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        return images * timesteps[:, None, None, None]


def test_a_network_may_return_a_bare_tensor() -> None:
    assert predict(Echo(), torch.ones(2, 1, 1, 1), torch.tensor([2, 3])).flatten().tolist() == [2, 3]


@pytest.mark.parametrize(
    ("name", "shape", "args", "message"),
    [
        ("unte", (1, 8, 8), {}, "must be one of unet, ddpm_cifar10, .*, got 'unte'"),
        (
            "unet",
            (1, 9, 8),
            UNET,
            "height and width divisible by 2, got 9x8. Take 8 or 10 for the height and 8 for the",
        ),
        (
            "unet",
            (1, 28, 28),
            {"block_out_channels": (8, 8, 8, 8)},
            "4 levels and halves images 3 times, which needs a height and width divisible by 8, got 28x28. "
            "Take 24 or 32 for the height and 24 or 32 for the width, or at most 3 levels",
        ),
        ("ddpm_cifar10", (3, 28, 28), {}, "Take 24 or 32 for the height"),
        ("unet", (1, 3, 3), UNET, "Take 2 or 4 for the height"),
        ("dit", (1, 8, 12), DIT, "square images with a side divisible by patch_size=2, got 8x12. Take 8x8 or 10x10"),
        ("dit", (1, 9, 9), DIT, "got 9x9. Take 8x8 or 10x10, or another patch_size"),
        ("unet", (8, 8), UNET, r"image_shape must be \(C, H, W\), got \(8, 8\)"),
        ("unet", (1, 8, 8), {"widths": (8, 16)}, "unet does not take 'widths'. It takes: .*block_out_channels"),
        ("unet", (1, 8, 8), {"in_channels": 3}, "unet does not take 'in_channels'"),
        ("dit", (1, 8, 8), {"sample_size": 3}, "dit does not take 'sample_size'"),
        ("unet", (1, 8, 8), {**UNET, "attention_levels": [2]}, r"attention_levels must be in 0\.\.1, got \[2\]"),
        ("unet", (1, 8, 8), {**UNET, "norm_num_groups": 16}, r"multiples of norm_num_groups=16, got \[8, 16\]"),
        ("unet", (1, 8, 8), {**UNET, "num_classes": 0}, "num_classes must be 1 or more, or None"),
    ],
)
def test_misfits_are_refused_with_what_fits(name: Any, shape: Any, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_denoiser(name, image_shape=shape, **args)


def test_an_image_shape_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"image_shape must be \(C, H, W\), got None"):
        check_image_shape(None)


def test_without_diffusers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "dia-lightning\[diffusion\]"'):
        get_denoiser("unet", image_shape=(1, 8, 8))
