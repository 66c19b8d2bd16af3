"""What is compared: networks without and with attention, from this package and from others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from dia_lightning.attention import attach
from dia_lightning.models import get_model

Build = Callable[[], nn.Module]
PLAIN, SE_PER_BLOCK, SE_SHARED, DIA = "plain", "SE per block", "SE shared", "DIA-LSTM"


@dataclass(frozen=True)
class Family:
    """A plain network, and the same network with attention.

    Args:
        made_by: the library that the attention comes from.
        needs: packages that must be installed, else it is left out.
        arms: builders by name, starting with the plain network, which the others are compared with.
    """

    made_by: str
    needs: tuple[str, ...]
    arms: dict[str, Build]

    @property
    def left_out(self) -> str:
        """Why nothing can be measured; empty if it can be."""
        missing = [package for package in self.needs if find_spec(package) is None]
        return f"{' and '.join(missing)} not installed" if missing else ""


@dataclass(frozen=True)
class Workload:
    """Networks of one architecture, and their images.

    Args:
        title: its name in the tables.
        batch: images per step.
        size: height and width of an image.
        classes: number of classes.
        sites: number of maps that a forward computes in this package's arms, one per residual branch.
        families: the networks of each library.
    """

    title: str
    batch: int
    size: int
    classes: int
    sites: int
    families: tuple[Family, ...]


def attached(build: Build) -> dict[str, Build]:
    """Return the arms of this package on a plain network."""
    return {
        PLAIN: build,
        SE_PER_BLOCK: lambda: attach(build(), "se", share="block"),
        SE_SHARED: lambda: attach(build(), "se"),
        DIA: lambda: attach(build(), "dia-lstm"),
    }


def own(build: Build, *needs: str, more: dict[str, Build] | None = None) -> Family:
    """Return the family of this package."""
    return Family("dia_lightning", needs, {**attached(build), **(more or {})})


def pytorchcv(**names: str) -> Family:
    """Return pytorchcv's networks, given its names for the plain one, SE and DIA."""
    return Family("pytorchcv", ("pytorchcv",), _arms("pytorchcv.model_provider", "get_model", names))


def timm(**names: str) -> Family:
    """Return timm's networks, given its names for the plain one and SE."""
    return Family("timm", ("timm",), _arms("timm", "create_model", names))


def _arms(module: str, function: str, names: dict[str, str]) -> dict[str, Build]:
    titles = {"plain": PLAIN, "se": SE_PER_BLOCK, "dia": DIA}
    return {titles[key]: partial(_imported, module, function, name) for key, name in names.items()}


def _imported(module: str, function: str, name: str) -> nn.Module:
    build: Callable[..., nn.Module] = getattr(import_module(module), function)
    return build(name, pretrained=False)


def cifar_resnet(**options: Any) -> Build:
    """Return a builder of this package's CIFAR ResNet."""
    return partial(get_model, "cifar_resnet", num_classes=100, **options)


def vit_s() -> nn.Module:
    """Build timm's ViT-S/16, or torchvision's network of the same size."""
    if find_spec("timm") is not None:
        return get_model("timm/vit_small_patch16_224")
    from torchvision.models import VisionTransformer

    return VisionTransformer(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)  # type: ignore[no-any-return]


_RESNET50 = partial(get_model, "torchvision/resnet50")
_OWN50 = own(_RESNET50, "torchvision", more={f"{DIA}, r = 20": lambda: attach(_RESNET50(), "dia-lstm", reduction=20)})
_CV164 = pytorchcv(plain="resnet164bn_cifar100", se="seresnet164bn_cifar100", dia="diaresnet164bn_cifar100")
_CV20 = pytorchcv(plain="resnet20_cifar100", se="seresnet20_cifar100", dia="diaresnet20_cifar100")
_CV50 = pytorchcv(plain="resnet50", se="seresnet50", dia="diaresnet50")

WORKLOADS = {
    "resnet164": Workload("ResNet164, 32x32", 16, 32, 100, 54, (own(partial(get_model, "resnet164")), _CV164)),
    "resnet50": Workload(
        "ResNet50, 224x224", 4, 224, 1000, 16, (_OWN50, _CV50, timm(plain="resnet50", se="seresnet50"))
    ),
    "vit_s": Workload("ViT-S/16, 224x224", 4, 224, 1000, 24, (own(vit_s, "torchvision"),)),
    "resnet20": Workload("ResNet20, 32x32", 16, 32, 100, 9, (own(cifar_resnet(depth=20, block="basic")), _CV20)),
    "tiny": Workload(
        "ResNet14, 32x32",
        2,
        32,
        100,
        6,
        (
            own(cifar_resnet(depth=14, block="basic")),
            pytorchcv(plain="resnet20_cifar100", dia="diaresnet20_cifar100"),
            timm(plain="resnet10t", se="seresnet18"),
        ),
    ),
}
