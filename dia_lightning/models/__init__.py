"""Networks by name: the plain CIFAR families of the DIANet authors, and those of torchvision and timm."""

from dia_lightning.models._build_on_meta import build_on_meta
from dia_lightning.models._cifar_network import CifarNetwork
from dia_lightning.models._cost import Cost, network_cost
from dia_lightning.models._dianet_checkpoint import load_dianet_checkpoint
from dia_lightning.models._export import Exported, export_network
from dia_lightning.models._export_detector import export_detector
from dia_lightning.models._exported_detector import ExportedDetector
from dia_lightning.models._pretrained import from_pretrained, push_to_hub, save_pretrained
from dia_lightning.models._registry import get_model, list_models, register_model
from dia_lightning.models.cifar_preresnet import cifar_preresnet, preresnet164
from dia_lightning.models.cifar_resnet import cifar_resnet, resnet164
from dia_lightning.models.cifar_resnext import cifar_resnext, resnext101_8x32
from dia_lightning.models.cifar_wrn import cifar_wrn, wrn52_4

__all__ = [
    "CifarNetwork",
    "Cost",
    "Exported",
    "ExportedDetector",
    "build_on_meta",
    "cifar_preresnet",
    "cifar_resnet",
    "cifar_resnext",
    "cifar_wrn",
    "export_detector",
    "export_network",
    "from_pretrained",
    "get_model",
    "list_models",
    "load_dianet_checkpoint",
    "network_cost",
    "preresnet164",
    "push_to_hub",
    "register_model",
    "resnet164",
    "resnext101_8x32",
    "save_pretrained",
    "wrn52_4",
]
