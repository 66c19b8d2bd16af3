"""From noise to images, step by step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from dia_lightning.models.denoisers import predict
from dia_lightning.tasks._noise_schedule import NoiseSchedule, Sampler

#: How many predictions of the final image a trace has.
TRACE_LENGTH = 8


def seeded_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on all the numbers of a key (0 or more), and on nothing else."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) % 2**63)


class Denoising:
    """Sampling with a network and one of diffusers' schedulers.

    Args:
        network: predicts noise, velocity or image, on the device to sample on.
        schedule: the noise that it was trained with.
        sampler: ``"ddim"``, ``"ddpm"`` or ``"dpm++"``.
        steps: how often the network runs per image.
        guidance: weight w of the class, ``no class + w (class - no class)``.
        no_class: label that stands for no class; ``None`` for an unconditional network.
        seed: of the noise.

    Raises:
        ValueError: if the number of steps does not fit, or guidance is asked of an unconditional network.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        *,
        sampler: Sampler,
        steps: int,
        guidance: float,
        no_class: int | None,
        seed: int,
    ) -> None:
        if guidance != 1 and no_class is None:
            raise ValueError(f"guidance={guidance} needs a conditional task; this one knows no classes. Leave it out.")
        self.network = network
        self.guidance = guidance
        self.no_class = no_class
        self.seed = seed
        self.steps = steps
        self._new_scheduler = partial(schedule.sampler, sampler, steps)
        self._new_scheduler()  # refuses what does not fit

    def run(
        self, indices: Sequence[int], labels: Tensor | None, shape: tuple[int, int, int], bar: "tqdm[Any]", trace: bool
    ) -> Tensor:
        """Return the images ``[B, C, H, W]`` of some indices in about [-1, 1], or their trace ``[B, K, C, H, W]``."""
        # one generator per image, on the CPU: the same image in every batch and on every device
        generators = [seeded_generator(self.seed, index) for index in indices]
        parameter = next(self.network.parameters())
        images = torch.stack([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])
        images = images.to(parameter.device)
        scheduler = self._new_scheduler()  # of DPM-Solver++ one per batch, since it remembers steps
        shown = set(np.linspace(0, self.steps - 1, min(TRACE_LENGTH, self.steps)).round().astype(int).tolist())
        predictions = []
        for number, timestep in enumerate(scheduler.timesteps):
            prediction = self._guided(images.to(parameter.dtype), timestep.to(parameter.device), labels).float()
            step = scheduler.step(prediction, timestep, images, generator=generators)
            images = step.prev_sample
            if trace and number in shown:
                # DPM-Solver++ keeps its predictions of the image itself
                clean = getattr(step, "pred_original_sample", None)
                predictions.append(scheduler.model_outputs[-1] if clean is None else clean)
            bar.update(len(indices))
        return torch.stack(predictions, 1) if trace else images

    def _guided(self, images: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        timesteps = timestep.expand(len(images))
        if labels is None or self.no_class is None or self.guidance == 1:
            return predict(self.network, images, timesteps, labels)
        without = torch.full_like(labels, self.no_class)
        both = predict(self.network, images.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([labels, without]))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


def class_labels(count: int, classes: int | Sequence[int] | None, *, first: int, no_class: int | None) -> Tensor | None:
    """Return the label of each image ``[count]``; ``None`` for an unconditional network.

    Args:
        count: how many images.
        classes: one class for all or one per image; ``None`` goes round the classes, from the index ``first`` on.
        first: index of the first image.
        no_class: number of classes; ``None`` for an unconditional network.

    Raises:
        ValueError: if there are no classes to choose from, or a class is none of them.
    """
    if no_class is None:
        if classes is not None:
            raise ValueError(f"classes={classes} needs a conditional task; this one knows no classes. Leave it out.")
        return None
    if classes is None:
        return (first + torch.arange(count)) % no_class
    chosen = [classes] * count if isinstance(classes, int) else list(classes)
    if len(chosen) != count:
        raise ValueError(f"classes must be one class or one for each of the {count} images, got {len(chosen)}.")
    wrong = [label for label in chosen if not 0 <= label < no_class]
    if wrong:
        raise ValueError(f"classes must be in 0..{no_class - 1}, got {wrong[0]}.")
    return torch.tensor(chosen)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Switch all modules to evaluation, and each back to what it was."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
