"""Data modules of labelled images."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor
from torchvision.transforms import v2

from dia_lightning._choices import check_choice
from dia_lightning.datamodules._loader_processes import replicas
from dia_lightning.datamodules._number_checks import check_positive_or_zero
from dia_lightning.datamodules._sampling import (
    BalancedSampler,
    ClassificationSamples,
    MixingCollate,
    Positions,
    Role,
    Samples,
)
from dia_lightning.datamodules._transforms import Augment, build_transform
from dia_lightning.datamodules.base import DIADataModule
from dia_lightning.datamodules.sources import Source

PixelRange = Literal["standardized", "symmetric"]
Sampling = Literal["shuffle", "balanced"]


class ClassificationDataModule(DIADataModule):
    """Base of the data modules for classification; a subclass only defines where pixels come from.

    Batches are those of :class:`DIADataModule` with images ``[B, C, H, W]`` float32 and labels ``[B]`` int64; under
    mixup or cutmix, training labels are soft, ``[B, K]`` float32.

    A subclass sets ``mean`` and ``std`` of its pixels and ``image_shape`` (C, H, W), and implements
    :attr:`class_names`, :meth:`load_split` and :meth:`basic_augmentation`.

    Args:
        augment: ``"none"``: unchanged images. ``"flips"``: half of them mirrored, the usual recipe for diffusion.
            ``"basic"``: the standard recipe of the data set. ``"auto"``: basic, then torchvision's best-fitting
            AutoAugment policy. ``"strong"``: basic, then RandAugment and RandomErasing.
        pixel_range: ``"standardized"``: mean 0 and deviation 1, for classifiers. ``"symmetric"``: from -1 to 1, for
            diffusion.
        mixup: alpha of mixup, 0 or more; 0 turns it off. If cutmix is on too, each batch gets one of the two.
        cutmix: alpha of cutmix, 0 or more; 0 turns it off.
        sampling: ``"shuffle"``: every training image once per epoch. ``"balanced"``: every class equally often in an
            epoch of the same length; images of rare classes come several times, each time with new augmentation.
        **common: as :class:`DIADataModule` takes them.

    Raises:
        ValueError: if an option is of the wrong type or out of its range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int]
    policy: ClassVar[v2.AutoAugmentPolicy] = v2.AutoAugmentPolicy.IMAGENET

    def __init__(
        self,
        *,
        augment: Augment = "basic",
        pixel_range: PixelRange = "standardized",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        sampling: Sampling = "shuffle",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_positive_or_zero("mixup", mixup)
        check_positive_or_zero("cutmix", cutmix)
        check_choice("augment", augment, get_args(Augment))
        check_choice("pixel_range", pixel_range, get_args(PixelRange))
        check_choice("sampling", sampling, get_args(Sampling))
        self.augment = augment
        self.pixel_range = pixel_range
        self.mixup = mixup
        self.cutmix = cutmix
        self.sampling = sampling

    @abstractmethod
    def basic_augmentation(self) -> Sequence[v2.Transform]:
        """Return the standard training recipe: from a PIL image to one of the size of ``image_shape``."""

    def resizing(self) -> Sequence[v2.Transform]:
        """Return the steps that bring a PIL image to the size of ``image_shape`` for evaluation."""
        size = self.image_shape[1:]
        return [v2.Resize(min(size)), v2.CenterCrop(size)]

    @property
    def image_channels(self) -> int:
        """Return 1 for grey images, 3 for RGB."""
        return self.image_shape[0]

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return, per channel, what is subtracted from pixels in [0, 1], and what they are then divided by."""
        if self.pixel_range == "symmetric":
            half = (0.5,) * self.image_channels
            return half, half
        return self.mean, self.std

    def denormalize(self, images: Tensor) -> Tensor:
        """Undo the normalisation.

        Args:
            images: those of a batch, ``[..., C, H, W]``.

        Returns:
            Pixels in [0, 1], same shape.
        """
        mean, std = (images.new_tensor(values) for values in self.normalization)
        return (images * std[:, None, None] + mean[:, None, None]).clamp(0, 1)

    def make_samples(self, source: Source, positions: Positions, *, role: Role) -> ClassificationSamples:
        """Return normalised tensors, augmented for training."""
        mean, std = self.normalization
        transform = build_transform(
            self.augment if role == "train" else "none",
            resize=self.resizing(),
            basic=self.basic_augmentation(),
            policy=self.policy,
            mean=mean,
            std=std,
        )
        return ClassificationSamples(source, positions, transform=transform, role=role)

    def training_sampler(self, dataset: Samples) -> BalancedSampler | None:
        """Draw every class equally often if requested."""
        if self.sampling == "shuffle":
            return None
        count, rank = replicas(self.trainer)
        return BalancedSampler(dataset, num_replicas=count, rank=rank, seed=self.training_seed)

    def collate_function(self, role: Role) -> MixingCollate | None:
        """Mix training batches if requested."""
        if role != "train" or (self.mixup == 0 and self.cutmix == 0):
            return None
        return MixingCollate(mixup=self.mixup, cutmix=self.cutmix, num_classes=self.num_classes)
