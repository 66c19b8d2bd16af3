"""Data modules with one API. Each knows where its pixels come from; everything else is in the base class."""

from dia_lightning._extras import require

require("lightning", "sklearn", by=__name__)

from dia_lightning.datamodules._sampling import SampleError
from dia_lightning.datamodules.base import DIADataModule
from dia_lightning.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from dia_lightning.datamodules.classification import ClassificationDataModule
from dia_lightning.datamodules.coco_detection import CocoDetectionDataModule
from dia_lightning.datamodules.detection import DetectionDataModule
from dia_lightning.datamodules.digit_scenes import DigitScenesDataModule
from dia_lightning.datamodules.digits import DigitsDataModule
from dia_lightning.datamodules.fashion_mnist import FashionMNISTDataModule
from dia_lightning.datamodules.image_folder import ImageFolderDataModule
from dia_lightning.datamodules.image_table import ImageTableDataModule
from dia_lightning.datamodules.sources import ArraySource, FileSource, Source
from dia_lightning.datamodules.stl10 import STL10DataModule
from dia_lightning.datamodules.voc_detection import VOCDetectionDataModule

__all__ = [
    "ArraySource",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ClassificationDataModule",
    "CocoDetectionDataModule",
    "DIADataModule",
    "DetectionDataModule",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "FileSource",
    "ImageFolderDataModule",
    "ImageTableDataModule",
    "STL10DataModule",
    "SampleError",
    "Source",
    "VOCDetectionDataModule",
]
