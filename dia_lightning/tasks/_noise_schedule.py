"""How much noise an image has at each timestep, and what a network must predict from it."""

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from dia_lightning._choices import check_choice
from dia_lightning.models.denoisers import require_diffusers
from dia_lightning.models.denoising import check_divides, ddpm_variance

Prediction: TypeAlias = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule: TypeAlias = Literal["linear", "cosine"]
LossWeighting: TypeAlias = Literal["uniform", "min_snr"]
Sampler: TypeAlias = Literal["ddim", "ddpm", "dpm++"]


class NoiseSchedule:
    """The forward process of DDPM, using diffusers' schedulers, and what training needs of it.

    Args:
        prediction: what the network predicts: the noise, the velocity or the image.
        timesteps: number of noise levels T.
        beta_schedule: ``"linear"``, DDPM's, with betas from 0.0001 to 0.02 for T = 1000 and in proportion for other T;
            or ``"cosine"``.

    Raises:
        ValueError: if a name is unknown or a number is out of its range.
        ImportError: if diffusers is not installed.

    Source:
        arXiv 2006.11239 (linear); arXiv 2102.09672 (cosine, and the proportion, in the authors' code).
    """

    def __init__(self, *, prediction: Prediction, timesteps: int, beta_schedule: BetaSchedule) -> None:
        check_choice("prediction", prediction, get_args(Prediction))
        check_choice("beta_schedule", beta_schedule, get_args(BetaSchedule))
        least = 25 if beta_schedule == "linear" else 2  # with fewer, the last linear beta is near 1 or above
        if timesteps < least:
            raise ValueError(f"timesteps must be {least} or more for a {beta_schedule} schedule, got {timesteps}.")
        self.timesteps = timesteps
        self.prediction = prediction
        self._config: dict[str, Any] = {
            "num_train_timesteps": timesteps,
            "prediction_type": prediction,
            "beta_schedule": "squaredcos_cap_v2" if beta_schedule == "cosine" else "linear",
            "beta_start": 1e-4 * 1000 / timesteps,
            "beta_end": 0.02 * 1000 / timesteps,
        }
        self._scheduler = require_diffusers().DDPMScheduler(**self._config)

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return images ``[B, C, H, W]`` noised to timesteps ``[B]``, in float32.

        Half precision cannot tell the smallest noise levels from none.
        """
        noisy: Tensor = self._scheduler.add_noise(images.float(), noise.float(), timesteps)
        return noisy

    def target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should predict, ``[B, C, H, W]`` float32."""
        if self.prediction == "v_prediction":
            velocity: Tensor = self._scheduler.get_velocity(images.float(), noise.float(), timesteps)
            return velocity
        return noise.float() if self.prediction == "epsilon" else images.float()

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio, of the variances of image and noise, at timesteps ``[B]``."""
        kept: Tensor = self._scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return kept / (1 - kept)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the loss weights ``[B]`` at timesteps ``[B]``.

        The weight of an error of the image is min(SNR, gamma); an error of the noise is one of the image times SNR, and
        one of the velocity times SNR + 1.

        Source:
            arXiv 2303.09556, section 3.4.
        """
        snr = self.signal_to_noise(timesteps)
        per_unit = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}
        return snr.clamp(max=gamma) / per_unit[self.prediction]

    def sampler(self, name: Sampler, steps: int) -> Any:
        """Return diffusers' scheduler for sampling in ``steps`` steps.

        Raises:
            ValueError: if the name is unknown or the number of steps is invalid.
        """
        check_choice("sampler", name, get_args(Sampler))
        self._check_steps(name, steps)
        diffusers = require_diffusers()
        if name == "ddim":
            scheduler = diffusers.DDIMScheduler(clip_sample=True, **self._config)
        elif name == "ddpm":
            variance = ddpm_variance(steps, self.timesteps)
            scheduler = diffusers.DDPMScheduler(clip_sample=True, variance_type=variance, **self._config)
        else:
            # at high noise levels the predicted image is far outside [-1, 1], and this one has no clip_sample
            scheduler = diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=1.0, **self._config)
        scheduler.set_timesteps(steps)
        return scheduler

    def _check_steps(self, sampler: Sampler, steps: int) -> None:
        total = self.timesteps
        if sampler == "dpm++":
            if not 1 <= steps < total:
                raise ValueError(f"steps must be from 1 to {total - 1} for sampler='dpm++', got {steps}.")
            return
        check_divides(steps, total, sampler=f"sampler={sampler!r}", otherwise="sampler='dpm++', which takes any number")
