"""Frozen networks that describe images, so that sets of images can be compared."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from dia_lightning._extras import needed_by
from dia_lightning.tasks.checkpoints import load_task
from dia_lightning.tasks.classification import ClassificationTask


class ImageFeatures(nn.Module, ABC):
    """A network without gradients, always in evaluation mode, called with images ``[B, C, H, W]`` uint8.

    It returns features ``[B, D]`` and logits ``[B, K]``.
    """

    #: Names of the K classes, where they mean something to the user.
    class_names: Sequence[str] | None = None
    #: Numbers of image channels that the network accepts.
    known_channels: tuple[int, ...] = (1, 3)

    def freeze(self) -> None:
        """Switch gradients and training mode off."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "ImageFeatures":
        """Stay in evaluation mode."""
        return super().train(False)

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits."""


class ClassifierFeatures(ImageFeatures):
    """A classifier of this package: the input of its last linear layer, and its logits.

    Images are converted to the size, channels and normalisation that the classifier was trained with.

    Args:
        checkpoint: file of a :class:`ClassificationTask`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or a network that does not end in a linear layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, checkpoint: str | Path) -> None:
        super().__init__()
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(
                f"There is no classifier {str(checkpoint)!r}. Train one on the same classes, or give the path of its "
                "checkpoint."
            )
        task = load_task(checkpoint)
        if not isinstance(task, ClassificationTask):
            raise ValueError(f"{checkpoint} must hold a ClassificationTask, but holds a {type(task).__name__}.")
        if task.task != "multiclass":
            raise ValueError(f"{checkpoint} must hold a classifier with task='multiclass', but has {task.task!r}.")
        if task.image_shape is None or task.normalization is None:
            raise ValueError(
                f"{checkpoint} does not know the size and normalisation of its images. Train it with a data module of "
                "this package."
            )
        self.channels, *self.size = task.image_shape
        self.known_channels = (1, 3) if self.channels in (1, 3) else (self.channels,)
        mean, std = task.normalization
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.class_names = task.class_names
        self.network = task.backbone
        self.freeze()
        self._last_linear = self._find_last_linear(checkpoint)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features ``[B, D]`` and logits ``[B, K]`` of images ``[B, C, H, W]`` uint8."""
        pixels = images.float() / 255
        if list(pixels.shape[2:]) != self.size:
            pixels = F.interpolate(pixels, size=self.size, mode="bilinear", antialias=True)
        if pixels.shape[1] != self.channels:
            pixels = rgb_to_grayscale(pixels) if self.channels == 1 else pixels.expand(-1, self.channels, -1, -1)
        return self._run((pixels - self.mean) / self.std)

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = self._last_linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.network(pixels)
        finally:
            hook.remove()
        return seen[-1] if seen else logits.new_empty(0), logits

    def _find_last_linear(self, checkpoint: str | Path) -> nn.Linear:
        """Return the linear layer that produces the network's output."""
        for layer in reversed([module for module in self.network.modules() if isinstance(module, nn.Linear)]):
            self._last_linear = layer
            with torch.no_grad():
                features, logits = self._run(torch.zeros(1, self.channels, *self.size))
                if features.ndim == 2 and torch.equal(layer(features), logits):
                    return layer
        raise ValueError(
            f"The network of {checkpoint} does not end in a linear layer, so there are no features to compare. Use "
            "another backbone, for example cifar_resnet."
        )


class InceptionFeatures(ImageFeatures):
    """The Inception network of the FID, from torch-fidelity: pooled features (D = 2048) and logits without bias.

    Args:
        weights: file ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's releases; ``None`` lets
            torch-fidelity download it once to torch's cache.

    Raises:
        ImportError: if torch-fidelity is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else, or cannot be downloaded.

    Source:
        arXiv 1706.08500 (FID); the weights are TensorFlow's of 2015, as torch-fidelity converted them.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        with needed_by("FID"):
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        path = _fetched(URL_INCEPTION_V3) if weights is None else Path(weights)
        _check_holds_weights_only(path)
        try:
            self.network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:  # from load_state_dict, with a line per tensor
            raise ValueError(f"{path} does not hold the weights of torch-fidelity's Inception network.") from error
        self.freeze()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features ``[B, 2048]`` and logits ``[B, 1008]`` of images ``[B, C, H, W]`` uint8."""
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


def _fetched(url: str) -> Path:
    """Return the file of a URL in torch's cache, downloading it if missing; its name ends in its checksum."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2])
    except (OSError, RuntimeError) as error:  # no network, a full disk; a wrong checksum
        raise ValueError(
            f"The weights of Inception cannot be downloaded ({error}). Fetch {url} elsewhere and give the file."
        ) from error
    return path


def _check_holds_weights_only(path: Path) -> None:
    """Refuse a file that could run code; torch-fidelity would not."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r} with the weights of Inception.")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # an invalid file fails in many ways
        raise ValueError(
            f"{path} is not a weights file ({type(error).__name__}). Delete it, or give another."
        ) from error
