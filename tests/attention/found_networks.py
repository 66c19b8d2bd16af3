"""Small networks of many kinds whose sites are found by running them, not by a rule."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from torch import nn
from torchvision import models

from dia_lightning.models import get_model


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=10, **options)


def dense(name: str) -> Callable[[], nn.Module]:
    return partial(models.get_model, name, weights=None, weights_backbone=None, num_classes=3)


#: Name -> how to build the network, and the shape of its input.
FOUND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cait": (of_timm("cait_xxs24_224", depth=2, img_size=32), (3, 32, 32)),
    "convmixer": (of_timm("convmixer_768_32"), (3, 32, 32)),
    "csatv2": (of_timm("csatv2"), (3, 64, 64)),
    "davit": (of_timm("davit_tiny", depths=(1, 1, 1, 1)), (3, 64, 64)),
    "edgenext": (of_timm("edgenext_xx_small"), (3, 64, 64)),
    "efficientvim": (of_timm("efficientvim_m1"), (3, 64, 64)),
    "focalnet": (of_timm("focalnet_tiny_srf"), (3, 64, 64)),
    "ghostnet": (of_timm("ghostnet_050"), (3, 64, 64)),
    "hiera": (of_timm("hiera_tiny_224", img_size=64), (3, 64, 64)),
    "hrnet": (of_timm("hrnet_w18_small"), (3, 64, 64)),
    "mambaout": (of_timm("mambaout_femto", depths=(1, 1, 2, 1)), (3, 64, 64)),
    "mixer": (of_timm("mixer_s32_224"), (3, 224, 224)),
    "nextvit": (of_timm("nextvit_small"), (3, 64, 64)),
    "poolformer": (of_timm("poolformerv2_s12"), (3, 64, 64)),
    "pvt v2": (of_timm("pvt_v2_b0"), (3, 64, 64)),
    "res2net": (of_timm("res2next50"), (3, 64, 64)),
    "resnetv2": (of_timm("resnetv2_18"), (3, 64, 64)),
    "tresnet": (of_timm("tresnet_m"), (3, 64, 64)),
    "twins": (of_timm("twins_svt_small"), (3, 64, 64)),
    "xcit": (of_timm("xcit_nano_12_p8_224", depth=2), (3, 32, 32)),
    "torchvision lraspp": (dense("lraspp_mobilenet_v3_large"), (3, 64, 64)),
    "torchvision maxvit": (
        partial(
            models.MaxVit,
            input_size=(64, 64),
            stem_channels=16,
            block_channels=[16, 32],
            block_layers=[1, 1],
            head_dim=8,
            stochastic_depth_prob=0.0,
            partition_size=4,
            num_classes=10,
        ),
        (3, 64, 64),
    ),
    "torchvision mnasnet": (partial(get_model, "torchvision/mnasnet0_5", num_classes=10), (3, 64, 64)),
    "torchvision r3d": (partial(models.get_model, "r3d_18", weights=None, num_classes=10), (3, 4, 32, 32)),
    "torchvision swin3d": (partial(models.get_model, "swin3d_t", weights=None, num_classes=10), (3, 4, 32, 32)),
}

#: Networks in which a block without its branch is not the identity, and why.
OWN_SHORTCUT = {
    "davit": "convolutions that encode positions are left out",
    "efficientvim": "depthwise convolutions, which are linear, are left out",
    "poolformer": "its shortcuts are scaled",
    "tresnet": "the ReLU after the first addition",
    "xcit": "blocks of the class token normalise their shortcut",
}
