"""From noise to images, step by step: for the pipelines here and for the diffusion task."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dia_lightning.models.denoisers import predict

#: Number of predictions of the final image in a trace.
TRACE_LENGTH = 8


def seeded_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends only on the numbers of a key (0 or more)."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) % 2**63)


class Denoising:
    """Sampling with a network and one of diffusers' schedulers.

    Args:
        network: predicts noise, velocity or image, on the device to sample on.
        new_scheduler: returns a new scheduler at every call, with its steps set.
        guidance: weight w of the class, ``no class + w (class - no class)``.
        no_class: label for no class; ``None`` for an unconditional network.
        seed: of the noise, 0 or more.

    Raises:
        ValueError: if guidance is not a number or the network is unconditional, or the scheduler refuses its steps.
    """

    def __init__(
        self,
        network: nn.Module,
        new_scheduler: Callable[[], Any],
        *,
        guidance: float,
        no_class: int | None,
        seed: int,
    ) -> None:
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}. 1 is none.")
        if guidance != 1 and no_class is None:
            raise ValueError(f"guidance={guidance} needs a conditional task; this one knows no classes. Leave it out.")
        check_least("seed", seed, 0)
        self.network = network
        self.guidance = guidance
        self.no_class = no_class
        self.seed = seed
        #: Noise levels from the first step to the last.
        self.timesteps: list[float] = new_scheduler().timesteps.tolist()  # refuses what does not fit
        #: How often the network runs per image.
        self.steps = len(self.timesteps)
        self._new_scheduler = new_scheduler

    def run(
        self,
        indices: Sequence[int],
        labels: Tensor | None,
        shape: tuple[int, int, int],
        *,
        after_step: Callable[[], object],
        trace: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Return the images ``[B, C, H, W]`` in [0, 1] of some indices, or their trace ``[B, K, C, H, W]``."""
        # one generator per image, on the CPU: the same image in every batch and on every device
        generators = [seeded_generator(self.seed, index) for index in indices] if generator is None else generator
        parameter = next(self.network.parameters())
        images = _noise((len(indices), *shape), generators)
        scheduler = self._new_scheduler()  # of DPM-Solver++ one per batch, since it remembers steps
        images = images.to(parameter.device) * scheduler.init_noise_sigma
        random = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        shown = set(self.traced_steps())
        predictions = []
        for number, timestep in enumerate(scheduler.timesteps):
            noisy = scheduler.scale_model_input(images, timestep).to(parameter.dtype)
            prediction = self._guided(noisy, timestep.to(parameter.device), labels).float()
            step = scheduler.step(prediction, timestep, images, **random)
            images = step.prev_sample
            if trace and number in shown:
                # DPM-Solver++ itself keeps its predictions of the image
                clean = getattr(step, "pred_original_sample", None)
                predictions.append(scheduler.model_outputs[-1] if clean is None else clean)
            after_step()
        return ((torch.stack(predictions, 1) if trace else images) / 2 + 0.5).clamp(0, 1)

    def traced_steps(self) -> list[int]:
        """Return the indices of the steps shown in a trace, spread evenly from the first to the last."""
        numbers: list[int] = np.linspace(0, self.steps - 1, min(TRACE_LENGTH, self.steps)).round().astype(int).tolist()
        return numbers

    def _guided(self, images: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        timesteps = timestep.expand(len(images))
        if labels is None or self.no_class is None or self.guidance == 1:
            return predict(self.network, images, timesteps, labels)
        without = torch.full_like(labels, self.no_class)
        both = predict(self.network, images.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([labels, without]))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


def _noise(shape: tuple[int, ...], generators: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Return noise of a shape, from one generator for all or one per image, as diffusers pipelines draw it."""
    if isinstance(generators, torch.Generator):
        return torch.randn(shape, generator=generators, device=generators.device, dtype=torch.float32)
    return torch.stack([_noise(shape[1:], generator) for generator in generators])


def class_labels(count: int, classes: int | Sequence[int] | None, *, first: int, no_class: int | None) -> Tensor | None:
    """Return the label of each image ``[count]``; ``None`` for an unconditional network.

    Args:
        count: how many images.
        classes: one class for all or one per image; ``None`` cycles through the classes, starting at index ``first``.
        first: index of the first image.
        no_class: number of classes; ``None`` for an unconditional network.

    Raises:
        ValueError: if there are no classes to choose from, or a class is not among them.
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


def ddpm_variance(steps: int, total: int) -> str:
    """Return which of DDPM's two variances suits a number of steps.

    Source:
        arXiv 2010.02502 (DDIM), table 1: the larger one is better with all steps and much worse with few.
    """
    return "fixed_large" if steps == total else "fixed_small"


def check_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        ValueError: if it is below ``least``.
    """
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}.")


def check_divides(steps: int, timesteps: int, *, sampler: str, otherwise: str) -> None:
    """Refuse numbers of steps that DDIM and DDPM cannot spread over all timesteps.

    diffusers would round the step size down and start at a noise level where part of the image should be visible.

    Args:
        steps: how often the network runs per image.
        timesteps: number of noise levels T.
        sampler: name of the sampler in the message.
        otherwise: the alternative to other numbers, for the message.

    Raises:
        ValueError: if ``steps`` is less than 2 or does not divide ``timesteps``.
    """
    fitting = [number for number in range(2, timesteps + 1) if timesteps % number == 0]
    if steps not in fitting:
        below = max((number for number in fitting if number < steps), default=fitting[0])
        above = min((number for number in fitting if number > steps), default=fitting[-1])
        near = " or ".join(str(number) for number in sorted({below, above}))
        raise ValueError(
            f"steps must divide the {timesteps} timesteps for {sampler}, got {steps}. Take {near}, or {otherwise}."
        )
