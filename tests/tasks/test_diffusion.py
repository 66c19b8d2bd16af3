"""DiffusionTask: losses, samples, checkpoints, resume, faults."""

import math
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from dia_lightning.callbacks import EMA
from dia_lightning.datamodules import DigitsDataModule
from dia_lightning.models.denoisers import get_denoiser
from dia_lightning.models.denoising import seeded_generator
from dia_lightning.tasks import DiffusionTask, NonFiniteLossError, load_task
from dia_lightning.tasks._noise_schedule import NoiseSchedule
from tests.datamodules.tiny_data import samples_of
from tests.tasks.conftest import Given, small_trainer

NETWORK: dict[str, Any] = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
PREDICTIONS: list[Any] = ["epsilon", "v_prediction", "sample"]
SCHEDULES: list[Any] = [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]


def tiny_task(**options: Any) -> DiffusionTask:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"backbone": "unet", "image_shape": [1, 8, 8], "backbone_args": NETWORK, **options}
    return DiffusionTask(arguments.pop("backbone"), arguments.pop("num_classes", 3), **arguments)


def attached_task(**options: Any) -> DiffusionTask:
    return tiny_task(attention="dia-lstm", conditional=True, **options)


def symmetric_images(count: int = 4, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def some_batch(count: int = 4) -> tuple[Tensor, Tensor]:
    return symmetric_images(count), torch.arange(count) % 3


def some_noise(images: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(images.shape, generator=generator), torch.randint(1000, (len(images),), generator=generator)


# ---- the forward process and the loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("beta_schedule", "theirs"), SCHEDULES)
def test_the_loss_is_that_of_a_training_loop_of_diffusers(prediction: Any, beta_schedule: Any, theirs: str) -> None:
    task = tiny_task(prediction=prediction, beta_schedule=beta_schedule)
    images = symmetric_images()
    noise, timesteps = some_noise(images)
    scheduler = DDPMScheduler(beta_schedule=theirs, prediction_type=prediction)
    target = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(images, noise, timesteps),
        "sample": images,
    }[prediction]
    output = task.backbone(scheduler.add_noise(images, noise, timesteps), timesteps).sample
    # per image, so that nothing is added up in another order
    expected = torch.stack([F.mse_loss(*pair) for pair in zip(output, target, strict=True)])
    torch.testing.assert_close(task.losses(images, None, noise, timesteps), expected, rtol=1e-6, atol=0)


def closed_form(timesteps: int, beta_schedule: str) -> Tensor:
    """The share of the image's variance that is left after each step, from the papers' formulas in float64."""
    if beta_schedule == "linear":
        betas = torch.linspace(1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps, timesteps, dtype=torch.float64)
        return (1 - betas).cumprod(0)
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (f[1:] / f[:-1]).clamp(min=1 - 0.999).cumprod(0)


@pytest.mark.parametrize("timesteps", [100, 1000])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_noise_grows_as_the_closed_form_says(timesteps: int, beta_schedule: Any) -> None:
    schedule = NoiseSchedule(prediction="epsilon", timesteps=timesteps, beta_schedule=beta_schedule)
    kept = closed_form(timesteps, beta_schedule)
    every = torch.arange(timesteps)
    ones = torch.ones(timesteps, 1, 1, 1)
    image_part = schedule.add_noise(ones, 0 * ones, every).flatten()
    noise_part = schedule.add_noise(0 * ones, ones, every).flatten()
    torch.testing.assert_close(image_part, kept.sqrt().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(noise_part, (1 - kept).sqrt().float(), rtol=1e-3, atol=1e-5)
    assert kept[-1] < 1e-4  # nothing of the image is left


def test_noise_of_single_steps_adds_up_to_the_closed_form() -> None:
    schedule = NoiseSchedule(prediction="epsilon", timesteps=100, beta_schedule="linear")
    generator = torch.Generator().manual_seed(0)
    images = torch.full((20_000, 1, 1, 1), 0.5)
    kept = closed_form(100, "linear")
    betas = 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])
    for beta in betas[:30].tolist():
        images = math.sqrt(1 - beta) * images + math.sqrt(beta) * torch.randn(images.shape, generator=generator)
    at_once = schedule.add_noise(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([29]))
    assert images.mean().item() == pytest.approx(at_once.item(), abs=0.02)
    assert images.var().item() == pytest.approx(1 - kept[29].item(), abs=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_losses_as_the_formula_says(prediction: Any) -> None:
    images = symmetric_images()
    noise, timesteps = some_noise(images)
    kept = closed_form(1000, "linear")[timesteps]
    snr = kept / (1 - kept)
    expected = {
        "epsilon": snr.clamp(max=3) / snr,
        "v_prediction": snr.clamp(max=3) / (snr + 1),
        "sample": snr.clamp(max=3),
    }[prediction]
    uniform, weighted = (
        tiny_task(prediction=prediction, loss_weighting=weighting, snr_gamma=3.0).losses(images, None, noise, timesteps)
        for weighting in ("uniform", "min_snr")
    )
    torch.testing.assert_close(weighted / uniform, expected.float(), rtol=1e-3, atol=1e-6)
    assert (snr < 3).any()
    assert (snr > 3).any()


def test_one_error_of_the_image_has_the_same_weight_whatever_the_network_predicts() -> None:
    # An error d of the noise is one of d / sqrt(SNR) of the image, one of the velocity d / sqrt(SNR + 1).
    timesteps = torch.arange(0, 1000, 37)
    per_image_error = []
    for prediction in PREDICTIONS:
        schedule = NoiseSchedule(prediction=prediction, timesteps=1000, beta_schedule="linear")
        snr = schedule.signal_to_noise(timesteps)
        squared_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
        per_image_error.append(schedule.min_snr_weights(timesteps, 5.0) * squared_error)
    torch.testing.assert_close(per_image_error[0], per_image_error[1])
    torch.testing.assert_close(per_image_error[0], per_image_error[2])


def test_half_precision_keeps_small_noise() -> None:
    schedule = NoiseSchedule(prediction="epsilon", timesteps=1000, beta_schedule="linear")
    images = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    noisy = schedule.add_noise(images, torch.zeros_like(images), torch.tensor([0]))
    assert 0 < 1 - noisy.item() < 1e-4


def test_dropped_labels_are_those_of_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    task = attached_task(label_dropout=0.5)
    seen: list[Tensor] = []

    def losses(images: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
        seen.append(labels)
        return images.new_ones(len(images))

    monkeypatch.setattr(task, "losses", losses)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    labels = torch.arange(1000) % 3
    task.training_step((symmetric_images(1000), labels), 0)
    dropped = seen[0] == 3
    assert 0.4 < dropped.float().mean() < 0.6
    assert torch.equal(seen[0][~dropped], labels[~dropped])


def test_training_noise_differs_between_batches_epochs_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = symmetric_images()
    noises = [tiny_task().training_noise(images, batch)[0] for batch in (0, 1, 0)]
    for name in ("current_epoch", "global_rank"):
        with monkeypatch.context() as patch:
            patch.setattr(DiffusionTask, name, 1)
            noises.append(tiny_task().training_noise(images, 0)[0])
    assert torch.equal(noises[0], noises[2])
    different = [noises[0], noises[1], *noises[3:]]
    assert len({tuple(noise.flatten().tolist()) for noise in different}) == 4


def test_the_loss_of_validation_depends_on_the_images_alone_and_leaves_out_padding(tmp_path: Path) -> None:
    task = attached_task()
    images, labels = some_batch(6)
    index = torch.arange(6)
    whole = [(images, labels, index)]
    parts = [(images[:4], labels[:4], index[:4]), (images[4:], labels[4:], index[4:])]
    filled_up = [4, 5, 0]
    padded = [
        parts[0],
        (images[filled_up], labels[filled_up], torch.tensor([4, 5, -1])),
        (images[:2], labels[:2], torch.tensor([-1, -1])),
    ]
    trainer = small_trainer(tmp_path)
    results = [
        trainer.validate(task, Given(batches), verbose=False)[0]["val/loss"] for batches in (whole, parts, padded)
    ]
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


# ---- sampling


def pipeline_images(task: DiffusionTask, kind: Literal["ddim", "ddpm"], steps: int, count: int, seed: int) -> Tensor:
    """What diffusers' own pipeline makes of the same weights and noise."""
    config = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2, "prediction_type": task.noise.prediction}
    variance = "fixed_large" if steps == 100 else "fixed_small"
    pipeline = (
        DDIMPipeline(task.backbone, DDIMScheduler(**config))
        if kind == "ddim"
        else DDPMPipeline(task.backbone, DDPMScheduler(variance_type=variance, **config))
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [seeded_generator(seed, index) for index in range(count)]
    images = pipeline(count, generator=generators, num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)  # "pt" is not taken by diffusers before 0.41


@pytest.mark.parametrize(
    ("sampler", "steps", "prediction"),
    [("ddim", 10, "epsilon"), ("ddim", 20, "v_prediction"), ("ddpm", 10, "sample"), ("ddpm", 100, "epsilon")],
)
def test_samples_are_those_of_the_pipelines_of_diffusers(sampler: Any, steps: int, prediction: Any) -> None:
    task = tiny_task(timesteps=100, prediction=prediction)
    expected = pipeline_images(task, sampler, steps, count=3, seed=7)
    assert torch.equal(task.sample(3, steps=steps, sampler=sampler, seed=7), expected)
    assert expected.std() > 0.01


def test_dpm_solver_samples_are_those_of_a_loop_with_its_scheduler() -> None:
    task = tiny_task(beta_schedule="cosine").eval()
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", thresholding=True)
    scheduler.set_timesteps(8)
    images = torch.stack([torch.randn(1, 8, 8, generator=seeded_generator(0, index)) for index in range(3)])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            images = scheduler.step(task.backbone(images, timestep).sample, timestep, images).prev_sample
    torch.testing.assert_close(task.sample(3, steps=8, sampler="dpm++"), (images / 2 + 0.5).clamp(0, 1))


class Perfect(nn.Module):
    """The best possible network for a single image: it knows the image, so that sampling has to end there."""

    def __init__(self, image: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.image, self.kept = nn.Parameter(image), kept

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        kept = self.kept[timesteps][:, None, None, None].to(noisy.dtype)
        return (noisy - kept.sqrt() * self.image) / (1 - kept).sqrt()


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 10), ("ddpm", 50), ("dpm++", 12)])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_a_perfect_network_is_sampled_to_its_image(sampler: Any, steps: int, beta_schedule: Any) -> None:
    image = symmetric_images(1)[0]
    network = Perfect(image, closed_form(1000, beta_schedule))
    task = tiny_task(backbone=network, backbone_args=None, beta_schedule=beta_schedule)
    samples = task.sample(2, steps=steps, sampler=sampler)
    torch.testing.assert_close(samples, (image / 2 + 0.5).detach().expand(2, 1, 8, 8), atol=2e-3, rtol=0)


def test_with_an_identity_start_samples_are_those_of_the_plain_network_bit_for_bit() -> None:
    plain = tiny_task()
    attached = tiny_task(attention="dia-lstm", identity=True)
    attached.backbone.load_state_dict(plain.backbone.state_dict(), strict=False)
    for sampler in ("ddim", "ddpm", "dpm++"):
        options: dict[str, Any] = {"steps": 4, "sampler": sampler}
        assert torch.equal(attached.sample(3, **options), plain.sample(3, **options))


def test_attention_with_the_papers_start_changes_samples() -> None:
    plain = tiny_task()
    attached = tiny_task(attention="dia-lstm")
    attached.backbone.load_state_dict(plain.backbone.state_dict(), strict=False)
    assert not torch.allclose(attached.sample(3, steps=4), plain.sample(3, steps=4), atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_a_sample_depends_on_its_index_and_seed_alone(sampler: Any) -> None:
    task = attached_task()
    options: dict[str, Any] = {"steps": 4, "sampler": sampler, "seed": 3}
    whole = task.sample(5, **options)
    torch.testing.assert_close(task.sample(5, batch_size=2, **options), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(task.sample(2, first=3, **options), whole[3:], atol=1e-5, rtol=0)
    assert torch.equal(task.sample(5, **options), whole)
    assert not torch.allclose(task.sample(5, **{**options, "seed": 4}), whole, atol=0.01)
    assert whole.amin() >= 0
    assert whole.amax() <= 1


def test_ddim_draws_nothing_after_the_first_noise() -> None:
    task = attached_task()
    state = torch.get_rng_state()
    task.sample(2, steps=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    first = task.sample(2, steps=4)
    torch.manual_seed(99)
    assert torch.equal(task.sample(2, steps=4), first)


def test_sampling_leaves_the_modes_of_modules_and_needs_no_gradients() -> None:
    task = attached_task(backbone_args={**NETWORK, "dropout": 0.5}).train()
    task.backbone.mid_block.eval()
    modes = [module.training for module in task.modules()]
    images = task.sample(2, steps=4)
    assert [module.training for module in task.modules()] == modes
    assert not images.requires_grad
    assert torch.equal(task.eval().sample(2, steps=4), images)  # dropout was off


@pytest.mark.parametrize(("guidance", "told"), [(1.0, [0, 1, 2]), (0.0, [3, 3, 3])])
def test_guidance_of_one_is_none_and_of_zero_ignores_the_class(guidance: float, told: list[int]) -> None:
    task = attached_task().eval()
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    images = torch.stack([torch.randn(1, 8, 8, generator=seeded_generator(0, index)) for index in range(3)])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = task.backbone(images, timestep, class_labels=torch.tensor(told)).sample
            images = scheduler.step(output, timestep, images).prev_sample
    samples, expected = task.sample(3, steps=4, classes=[0, 1, 2], guidance=guidance), (images / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=0)
    if guidance == 1:
        assert torch.equal(samples, expected)
    assert not torch.allclose(samples, task.sample(3, steps=4, classes=[0, 1, 2], guidance=0.5), atol=1e-3)


def test_guidance_goes_from_the_prediction_without_the_class_through_that_with_it() -> None:
    task = attached_task()
    weighted, conditional, unconditional = (task.sample(2, steps=2, guidance=w, trace=True)[:, 0] for w in (1.5, 1, 0))
    inside = (weighted > 0) & (weighted < 1) & (conditional > 0) & (conditional < 1)
    inside &= (unconditional > 0) & (unconditional < 1)
    line = unconditional + 1.5 * (conditional - unconditional)
    assert inside.any()
    torch.testing.assert_close(weighted[inside], line[inside], atol=1e-4, rtol=0)


def test_without_classes_a_conditional_task_goes_round_them() -> None:
    task = attached_task()
    turns = task.sample(4, steps=2)
    torch.testing.assert_close(task.sample(4, steps=2, classes=[0, 1, 2, 0]), turns, atol=1e-6, rtol=0)
    torch.testing.assert_close(task.sample(1, steps=2, classes=2, first=2)[0], turns[2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_a_trace_ends_with_the_sample(sampler: Any) -> None:
    task = attached_task()
    trace = task.sample(2, steps=20, sampler=sampler, trace=True)
    assert trace.shape == (2, 8, 1, 8, 8)
    torch.testing.assert_close(trace[:, -1], task.sample(2, steps=20, sampler=sampler), atol=1e-5, rtol=0)
    assert task.sample(2, steps=4, trace=True).shape == (2, 4, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 30}, "steps must divide the 1000 timesteps for sampler='ddim', got 30. Take 25 or 40"),
        ({"steps": 0}, "got 0. Take 2"),
        ({"steps": 1}, "got 1. Take 2"),
        ({"steps": 2000, "sampler": "ddpm"}, "got 2000. Take 1000"),
        ({"steps": 1000, "sampler": "dpm++"}, "steps must be from 1 to 999 for sampler='dpm\\+\\+', got 1000"),
        ({"sampler": "euler"}, r"sampler must be one of ddim, ddpm, dpm\+\+, got 'euler'"),
        ({"classes": 3}, r"classes must be in 0\.\.2, got 3"),
        ({"classes": [0, -1]}, r"classes must be in 0\.\.2, got -1"),
        ({"classes": [0]}, "one for each of the 2 images, got 1"),
        ({"count": 0}, "count must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"first": -1}, "first must be 0 or more, got -1"),
        ({"guidance": math.nan}, "guidance must be a finite number, got nan"),
        ({"guidance": math.inf}, "guidance must be a finite number, got inf"),
    ],
)
def test_what_cannot_be_sampled_is_said(options: dict[str, Any], message: str) -> None:
    arguments = {"count": 2, **options}
    with pytest.raises(ValueError, match=message):
        attached_task().sample(arguments.pop("count"), **arguments)


def test_classes_and_guidance_need_a_task_that_knows_them() -> None:
    with pytest.raises(ValueError, match="classes=1 needs a conditional task"):
        tiny_task().sample(1, classes=1)
    with pytest.raises(ValueError, match="guidance=2 needs a conditional task"):
        tiny_task().sample(1, guidance=2)
    with pytest.raises(ValueError, match="guidance=2 needs a task that was trained with label_dropout"):
        attached_task(label_dropout=0.0).sample(1, guidance=2)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_transformer_trains_and_samples(conditional: bool, tmp_path: Path) -> None:
    args = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    task = tiny_task(backbone="dit", backbone_args=args, conditional=conditional, attention="dia-lstm", lr=0.01)
    small_trainer(tmp_path, limit_val_batches=0).fit(task, Given([some_batch()]))
    assert torch.isfinite(task.sample(2, steps=2)).all()


# ---- gradients


def gradients(task: DiffusionTask) -> dict[str, Tensor | None]:
    images, labels = some_batch()
    task.losses(images, labels, *some_noise(images)).mean().backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in task.named_parameters()}


def test_every_parameter_of_the_attention_gets_gradients() -> None:
    # two blocks per stage, since the first has no hidden state yet; no reduction, so that no ReLU is dead by chance
    found = gradients(attached_task(backbone_args={**NETWORK, "layers_per_block": 2}, attention_args={"reduction": 1}))
    assert all(gradient is not None for gradient in found.values())
    attention = {name: gradient for name, gradient in found.items() if ".dia." in name}
    assert len(attention) == 3 * 8  # units of four layers with bias
    assert not [name for name, gradient in attention.items() if gradient is None or not gradient.any()]


def test_gradient_checkpointing_of_diffusers_gives_the_same_gradients() -> None:
    saving = attached_task(gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())
    direct, checkpointed = gradients(attached_task()), gradients(saving)
    assert direct.keys() == checkpointed.keys()
    for name, gradient in direct.items():
        assert torch.equal(gradient, checkpointed[name]), name  # type: ignore[arg-type]


# ---- checkpoints and resume


def test_a_checkpoint_gives_the_same_samples_again(tmp_path: Path) -> None:
    data = DigitsDataModule(image_size=8, channels=1, pixel_range="symmetric", batch_size=10, limit=20)
    task = attached_task(num_classes=10, prediction="v_prediction", beta_schedule="cosine")
    small_trainer(tmp_path).fit(task, data)
    samples = task.sample(3, steps=4, guidance=2.0)
    loaded = load_task(tmp_path / "last.ckpt")
    assert isinstance(loaded, DiffusionTask)
    assert loaded.class_names == [str(digit) for digit in range(10)]
    again = DiffusionTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    for other in (loaded, again):
        assert torch.equal(other.sample(3, steps=4, guidance=2.0), samples)


def test_the_checkpoint_of_an_average_samples_with_the_average(tmp_path: Path) -> None:
    task = attached_task(lr=0.05)
    callbacks = [EMA(decay=0.9), ModelCheckpoint(dirpath=tmp_path, save_last=True)]
    small_trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(task, Given([some_batch()] * 3))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    samples = load_task(tmp_path / "last.ckpt").sample(2, steps=4)  # type: ignore[operator]
    assert torch.equal(samples, task.sample(2, steps=4))
    task.load_state_dict(checkpoint["current_model_state"])
    assert not torch.allclose(samples, task.sample(2, steps=4), atol=1e-4)


class Losses(Callback):
    """Notes the loss of every step and, after every validation, that of the averaged weights."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(outputs["loss"].item())

    def on_validation_end(self, trainer: Any, *args: Any) -> None:
        self.seen.append(trainer.callback_metrics["val/loss"].item())


class Interrupt(Callback):
    """Ends the training as Ctrl-C would, when the third epoch begins."""

    def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_losses_of_the_whole_one(tmp_path: Path) -> None:
    batches = Given([some_batch(4), some_batch(5)])
    options: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "schedule": "cosine", "warmup_steps": 5}

    def trainer(folder: Path, *more: Callback) -> Any:
        callbacks = [EMA(decay=0.9), ModelCheckpoint(dirpath=folder, save_last=True), *more]
        return small_trainer(folder, max_epochs=4, num_sanity_val_steps=0, callbacks=callbacks)

    whole, first, second = Losses(), Losses(), Losses()
    trainer(tmp_path / "whole", whole).fit(attached_task(**options), batches)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, first, Interrupt()).fit(attached_task(**options), batches)
    torch.rand(11)  # the global generator is elsewhere
    resumed = attached_task(**options)
    trainer(tmp_path, second).fit(resumed, batches, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.seen + second.seen == whole.seen
    assert len(whole.seen) == 12


def test_weights_of_the_plain_network_start_one_with_attention(tmp_path: Path) -> None:
    plain = tiny_task(lr=0.05)
    small_trainer(tmp_path, limit_val_batches=0).fit(plain, Given([some_batch()]))
    attached = tiny_task(attention="dia-lstm", identity=True, init_from=str(tmp_path / "last.ckpt"))
    assert torch.equal(attached.sample(2, steps=4), plain.sample(2, steps=4))


# ---- faults


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    good = some_batch()
    bad = (torch.full_like(good[0], torch.nan), good[1])
    task = attached_task(lr=0.01)
    with pytest.raises(NonFiniteLossError, match=r"nan at batch 2 of epoch 0; the last finite loss was \d"):
        small_trainer(tmp_path, limit_val_batches=0).fit(task, Given([good, good, bad]))
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((symmetric_images(4, channels=3), torch.zeros(4).long()), r"shape \[3, 8, 8\].* image_shape \[1, 8, 8\]"),
        ((symmetric_images()[:, :, :6, :6], torch.zeros(4).long()), r"shape \[1, 6, 6\].* image_shape \[1, 8, 8\]"),
        ((symmetric_images() * 3, torch.zeros(4).long()), r"must be in \[-1, 1\], but range from -\d.* to \d"),
        ((symmetric_images(), torch.rand(4, 3)), "one label per image: disable mixup and cutmix"),
        (symmetric_images(), "one label per image"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, limit_val_batches=0).fit(attached_task(), Given([batch]))


def test_standardized_pixels_are_refused_before_the_first_batch(tmp_path: Path) -> None:
    data = DigitsDataModule(image_size=8, channels=1, batch_size=10, limit=20)
    with pytest.raises(ValueError, match=r"needs images in \[-1, 1\], but the data subtract \[0.3055\].*pixel_range"):
        small_trainer(tmp_path).fit(attached_task(num_classes=10), data)


def test_an_unconditional_task_needs_no_labels(tmp_path: Path) -> None:
    task = tiny_task(num_classes=None, lr=0.01)
    small_trainer(tmp_path).fit(task, Given([symmetric_images()]))
    assert task.sample(1, steps=2).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": None}, r"image_shape must be \(C, H, W\), got None"),
        ({"image_shape": [1, 9, 8]}, "Take 8 or 10 for the height"),
        ({"num_classes": None, "conditional": True}, "num_classes must be 1 or more for conditional=True, got None"),
        ({"prediction": "noise"}, "prediction must be one of epsilon, v_prediction, sample, got 'noise'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of linear, cosine, got 'sigmoid'"),
        ({"loss_weighting": "snr"}, "loss_weighting must be one of uniform, min_snr, got 'snr'"),
        ({"snr_gamma": 0.0}, "snr_gamma must be positive, got 0.0"),
        ({"label_dropout": 1.0}, r"label_dropout must be in \[0, 1\), got 1.0"),
        ({"timesteps": 10}, "timesteps must be 25 or more for a linear schedule, got 10"),
        ({"backbone": nn.Identity()}, "backbone_args are for a named backbone"),
        ({"attention": "dia_lstm"}, "Did you mean 'dia-lstm'"),
    ],
)
def test_a_wrong_option_is_refused_when_the_task_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_task(**options)


def test_without_diffusers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    network = get_denoiser("unet", image_shape=(1, 8, 8), block_out_channels=(8, 16))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for backbone, args in (("unet", NETWORK), (network, None)):
        with pytest.raises(ImportError, match=r'pip install "dia-lightning\[diffusion\]"'):
            tiny_task(backbone=backbone, backbone_args=args)


# ---- the data option and the command line


@pytest.mark.parametrize("augment", ["none", "flips", "basic"])
def test_symmetric_pixels_reach_from_minus_one_to_one(augment: Any) -> None:
    data = DigitsDataModule(image_size=8, channels=3, pixel_range="symmetric", augment=augment)
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert (images.amin(), images.amax()) == (-1, 1)
    assert data.normalization == ((0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(data.denormalize(images), images / 2 + 0.5)


def test_flips_mirror_every_second_image_and_nothing_else() -> None:
    def images(augment: Any) -> Tensor:
        data = DigitsDataModule(image_size=8, channels=1, pixel_range="symmetric", augment=augment)
        data.setup("fit")
        return torch.stack([image for image, _ in samples_of(data.train_dataloader())])

    torch.manual_seed(0)
    plain, flipped = images("none"), images("flips")
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(-1) == flipped).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 0.4 < mirrored.float().mean() < 0.6


def test_an_unknown_pixel_range_is_refused() -> None:
    with pytest.raises(ValueError, match="pixel_range must be one of standardized, symmetric, got 'unit'"):
        DigitsDataModule(pixel_range="unit")
