"""diffusers pipelines: folders that produce the images of the task they were exported from."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dia_lightning.attention import attach
from dia_lightning.models.denoisers import get_denoiser, predict
from dia_lightning.models.denoising import seeded_generator
from dia_lightning.models.pipelines import DIADiTTransformer2DModel, DIAPipeline, DIAUNet2DModel
from dia_lightning.tasks import DiffusionTask, export_pipeline

UNET: dict[str, Any] = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
DIT: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
DIA: dict[str, Any] = {"attention": "dia-lstm"}


def tiny_task(backbone: Any = "unet", **options: Any) -> DiffusionTask:
    """A task whose weights all differ from their initial values."""
    torch.manual_seed(0)
    arguments = {"backbone_args": {"unet": UNET, "dit": DIT}.get(backbone) if isinstance(backbone, str) else None}
    task = DiffusionTask(backbone, 3, **{"image_shape": [1, 8, 8], **arguments, **options})
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return task


def exported(task: DiffusionTask, folder: Path) -> DIAPipeline:
    export_pipeline(task, folder / "model")
    pipeline: DIAPipeline = quiet(DIAPipeline.from_pretrained(folder / "model"))
    return pipeline


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made(pipeline: Any, *args: Any, **options: Any) -> Tensor:
    images: Tensor = pipeline(*args, output_type="pt", **options).images
    return images


def generators(count: int, seed: int) -> list[torch.Generator]:
    return [seeded_generator(seed, index) for index in range(count)]


# ---- the images of the task


@pytest.mark.parametrize("backbone", ["unet", "dit"])
@pytest.mark.parametrize("attention", [None, "dia-lstm"])
@pytest.mark.parametrize("conditional", [False, True])
def test_the_folder_makes_the_images_of_the_task_bit_for_bit(
    backbone: str, attention: str | None, conditional: bool, tmp_path: Path
) -> None:
    task = tiny_task(backbone, attention=attention, conditional=conditional)
    pipeline = exported(task, tmp_path)
    expected = task.sample(3, steps=5, seed=7)
    assert torch.equal(made(pipeline, 3, num_inference_steps=5, seed=7), expected)
    assert expected.std() > 0.01
    if conditional:
        classes = [2, 2, 0]
        images = made(pipeline, class_labels=classes, num_inference_steps=5, guidance_scale=1.5)
        assert torch.equal(images, task.sample(3, classes=classes, steps=5, guidance=1.5))


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "v_prediction", "beta_schedule": "cosine", "timesteps": 100},
        {"share": "block", "attention": "se", "plug": "1|10101|11", "attention_args": {"reduction": 4}},
        {"identity": True},
        {"branch_norm": False, "branches": ["conv"]},
        {"image_shape": [3, 8, 12]},
        {"attention": "spa"},
    ],
)
def test_every_option_that_makes_the_network_is_in_the_folder(options: dict[str, Any], tmp_path: Path) -> None:
    task = tiny_task(**{"attention": "dia-lstm", **options})
    assert torch.equal(made(exported(task, tmp_path), 2, num_inference_steps=4), task.sample(2, steps=4))


def test_an_identity_start_is_still_one_after_loading(tmp_path: Path) -> None:
    plain = DiffusionTask("unet", image_shape=[1, 8, 8], backbone_args=UNET)
    attached = DiffusionTask("unet", image_shape=[1, 8, 8], backbone_args=UNET, attention="dia-lstm", identity=True)
    attached.backbone.load_state_dict(plain.backbone.state_dict(), strict=False)
    assert torch.equal(made(exported(attached, tmp_path), 2, num_inference_steps=4), plain.sample(2, steps=4))


def test_an_image_depends_on_its_index_and_seed_alone(tmp_path: Path) -> None:
    pipeline = exported(tiny_task(attention="dia-lstm", conditional=True), tmp_path)
    whole = made(pipeline, 3, num_inference_steps=4, seed=3)
    torch.testing.assert_close(made(pipeline, 2, num_inference_steps=4, seed=3), whole[:2], atol=1e-5, rtol=0)
    assert torch.equal(made(pipeline, 3, num_inference_steps=4, seed=3), whole)
    assert not torch.allclose(made(pipeline, 3, num_inference_steps=4, seed=4), whole, atol=0.01)


def test_classes_are_given_by_number_or_name(tmp_path: Path) -> None:
    task = tiny_task(attention="dia-lstm", conditional=True)
    task._data["class_names"] = ["cat", "dog", "2"]
    pipeline = exported(task, tmp_path)
    assert pipeline.labels == {"cat": 0, "dog": 1, "2": 2}
    by_number = made(pipeline, class_labels=[1, 2, 0], num_inference_steps=2)
    assert torch.equal(made(pipeline, class_labels=["dog", "2", 0], num_inference_steps=2), by_number)
    one = made(pipeline, 2, class_labels="dog", num_inference_steps=2)
    assert torch.equal(one, made(pipeline, 2, class_labels=[1, 1], num_inference_steps=2))
    assert len(made(pipeline, class_labels="dog", num_inference_steps=2)) == 1
    for labels in (torch.tensor([1, 2, 0]), np.array([1, 2, 0])):
        assert torch.equal(made(pipeline, class_labels=labels, num_inference_steps=2), by_number)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_come_as_pictures_arrays_and_tensors(channels: int, mode: str, tmp_path: Path) -> None:
    pipeline = exported(tiny_task(attention="dia-lstm", image_shape=[channels, 8, 12]), tmp_path)
    options: dict[str, Any] = {"num_inference_steps": 2}
    tensors = made(pipeline, 2, **options)
    (arrays,) = pipeline(2, output_type="np", return_dict=False, **options)
    pictures = pipeline(2, **options).images
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert [(picture.mode, picture.size) for picture in pictures] == [(mode, (12, 8))] * 2
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).reshape(arrays.shape)
    assert torch.equal(pixels, (torch.from_numpy(arrays) * 255).round().byte())


def test_half_precision_is_requested_as_usual(tmp_path: Path) -> None:
    task = tiny_task(attention="dia-lstm", conditional=True)
    export_pipeline(task, tmp_path / "model")
    pipeline = quiet(DIAPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}
    images = made(pipeline, 2, num_inference_steps=4, guidance_scale=1.5)
    assert images.dtype == torch.float32
    assert (images - task.sample(2, steps=4, guidance=1.5)).abs().mean() < 0.02
    assert pipeline.to(torch.float32).unet.dtype == torch.float32


def test_a_saved_pipeline_loads_again(tmp_path: Path) -> None:
    pipeline = exported(tiny_task("dit", attention="dia-lstm", conditional=True), tmp_path)
    pipeline.save_pretrained(tmp_path / "again")
    again = quiet(DIAPipeline.from_pretrained(tmp_path / "again"))
    assert torch.equal(made(again, 2, num_inference_steps=2), made(pipeline, 2, num_inference_steps=2))


# ---- samplers


def test_dpm_solver_is_swapped_in_as_in_diffusers(tmp_path: Path) -> None:
    task = tiny_task(attention="dia-lstm", beta_schedule="cosine")
    pipeline = exported(task, tmp_path)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    assert torch.equal(made(pipeline, 2, num_inference_steps=7), task.sample(2, steps=7, sampler="dpm++"))


def test_ancestral_sampling_is_swapped_in_as_in_diffusers(tmp_path: Path) -> None:
    task = tiny_task(attention="dia-lstm")
    pipeline = exported(task, tmp_path)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(made(pipeline, 2, num_inference_steps=8), task.sample(2, steps=8, sampler="ddpm"))


def test_ancestral_sampling_has_the_variance_of_the_task_at_all_steps_too(tmp_path: Path) -> None:
    task = tiny_task(attention="dia-lstm", timesteps=30)
    pipeline = exported(task, tmp_path)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    for steps in (10, 30):
        images = made(pipeline, 2, num_inference_steps=steps)
        assert torch.equal(images, task.sample(2, steps=steps, sampler="ddpm")), steps


def test_a_sampler_of_another_scale_is_run_as_in_a_loop_with_its_scheduler(tmp_path: Path) -> None:
    pipeline = exported(tiny_task(attention="dia-lstm"), tmp_path)
    scheduler = pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    noise = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators(2, seed=4)])
    images = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = pipeline.unet(scheduler.scale_model_input(images, timestep), timestep).sample
            images = scheduler.step(output, timestep, images).prev_sample
    expected = (images / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(made(pipeline, 2, num_inference_steps=6, seed=4), expected)
    assert expected.std() > 0.01


class Perfect(UNet2DModel):  # type: ignore[misc]
    """The best possible network for a single image: it knows the image, so sampling must end there."""

    def forward(self, noisy: Tensor, timesteps: Tensor, *args: Any) -> Any:
        kept = DDIMScheduler().alphas_cumprod[timesteps.round().long()][:, None, None, None]
        return (noisy - kept.sqrt() * 0.5) / (1 - kept).sqrt()


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_other_samplers_end_at_the_image_of_a_perfect_network(kind: Any) -> None:
    network = Perfect(sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
                      down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    pipeline = quiet(DIAPipeline(network, DDIMScheduler()))
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    torch.testing.assert_close(
        made(pipeline, 2, num_inference_steps=20), torch.full((2, 1, 4, 4), 0.75), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("is_list", [True, False])
def test_generators_give_the_images_of_pipelines_of_diffusers(is_list: bool) -> None:
    torch.manual_seed(0)
    network = get_denoiser("unet", image_shape=(1, 8, 8), **UNET)
    pipeline = quiet(DIAPipeline(network, DDIMScheduler()))
    stock = {DDIMPipeline: DDIMScheduler(), DDPMPipeline: DDPMScheduler(variance_type="fixed_small")}
    for kind, scheduler in stock.items():  # the second draws noise in every step

        def seeded() -> Any:
            return generators(2, seed=3) if is_list else torch.Generator().manual_seed(3)

        pipeline.scheduler = scheduler
        options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
        expected = quiet(kind(network, scheduler))(2, generator=seeded(), **options).images
        found = made(pipeline, 2, num_inference_steps=4, generator=seeded())
        torch.testing.assert_close(found, expected)
        one = seeded()
        first, second = (made(pipeline, 2, num_inference_steps=4, generator=one) for _ in range(2))
        assert torch.equal(first, found)
        assert not torch.allclose(second, first, atol=0.01)  # it continues, as in diffusers


# ---- pipelines of diffusers itself


def test_a_plain_unconditional_unet_becomes_a_stock_pipeline(tmp_path: Path) -> None:
    task = tiny_task(timesteps=50, beta_schedule="cosine")
    folder = export_pipeline(task, tmp_path / "model").path
    assert "dia_lightning" not in (folder / "model_index.json").read_text() + (folder / "unet/config.json").read_text()
    options: dict[str, Any] = {"output_type": "pt", "generator": generators(2, seed=5)}
    ddim = quiet(DDIMPipeline.from_pretrained(folder))(2, num_inference_steps=10, **options).images
    assert torch.equal(ddim, task.sample(2, steps=10, seed=5))
    options["generator"] = generators(2, seed=5)
    ddpm = quiet(DDPMPipeline.from_pretrained(folder))(2, num_inference_steps=50, **options).images
    assert torch.equal(ddpm, task.sample(2, steps=50, sampler="ddpm", seed=5))


def test_a_unet_with_attention_loads_into_a_stock_pipeline(tmp_path: Path) -> None:
    task = tiny_task(attention="dia-lstm")
    export_pipeline(task, tmp_path / "model")
    pipeline = quiet(DDPMPipeline.from_pretrained(tmp_path / "model"))
    assert isinstance(pipeline.unet, DIAUNet2DModel)
    images = pipeline(2, num_inference_steps=10, generator=generators(2, seed=0), output_type="pt").images
    assert torch.equal(images, task.sample(2, steps=10))


# ---- networks


def networks(kind: str) -> tuple[nn.Module, type[nn.Module]]:
    torch.manual_seed(0)
    args = UNET if kind == "unet" else DIT
    network = get_denoiser(kind, image_shape=(1, 8, 8), num_classes=3, **args)  # type: ignore[arg-type]
    return network, DIAUNet2DModel if kind == "unet" else DIADiTTransformer2DModel


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_network_is_the_plain_one_with_attention_attached(kind: str, tmp_path: Path) -> None:
    plain, build = networks(kind)
    network = build.from_config(plain.config, dia={**DIA, "reduction": 2})  # type: ignore[attr-defined]
    attach(plain, "dia-lstm", reduction=2).load_state_dict(network.state_dict())
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dia"] == {**DIA, "reduction": 2}
    loaded = build.from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert not loaded.training
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    with torch.no_grad():
        expected, found = (predict(each.eval(), images, torch.tensor([3, 900]), labels) for each in (plain, loaded))
    assert torch.equal(found, expected)


def test_a_transformer_with_attention_drops_no_labels_of_its_own() -> None:
    plain, build = networks("dit")
    network = build.from_config(plain.config, dia=DIA).train()  # type: ignore[attr-defined]
    images, labels = torch.randn(1, 1, 8, 8).expand(64, -1, -1, -1), torch.ones(64, dtype=torch.int64)
    predictions = predict(network, images, torch.full((64,), 500), labels)
    assert torch.allclose(predictions, predictions[:1], atol=1e-6)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_plain_weights_are_refused_where_attention_would_stay_empty(kind: str, tmp_path: Path) -> None:
    plain, build = networks(kind)
    plain.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"needs the arguments of attach, as dia=.*call attach"):
        build.from_pretrained(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"weights in .* are not those of a DIA.*\d+ differ.*then call attach"):
        build.from_pretrained(tmp_path, dia=DIA)  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}, {"device_map": {"": "cpu"}}], ids=str)
def test_every_way_of_loading_gives_the_same_network(options: dict[str, Any], tmp_path: Path) -> None:
    export_pipeline(tiny_task(attention="dia-lstm"), tmp_path / "model")
    saved = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = DIAUNet2DModel.from_pretrained(tmp_path / "model" / "unet", **options).state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())


def test_norms_under_their_names_of_version_0_1_are_found(tmp_path: Path) -> None:
    network = DIAUNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        dia={"attention": "srm"},
    )
    network.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {key.replace(".unit_norm.", ".conv2.unit_norm."): value + 1 for key, value in load_file(file).items()}
    assert any(".conv2.unit_norm." in key for key in old)
    save_file(old, file, metadata={"format": "pt"})
    loaded = DIAUNet2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, network.state_dict()[key] + 1) for key, value in loaded.items())


def test_loading_can_return_the_loading_info_of_diffusers(tmp_path: Path) -> None:
    export_pipeline(tiny_task(attention="dia-lstm"), tmp_path / "model")
    _, found = DIAUNet2DModel.from_pretrained(tmp_path / "model" / "unet", output_loading_info=True)
    assert found["missing_keys"] == []


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 30}, "must divide the 1000 timesteps for DDIMScheduler, got 30. Take 25 or 40"),
        ({"num_inference_steps": 1001}, "must be at most the 1000 timesteps of the network, got 1001"),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more, got 0"),
        ({"class_labels": 3}, r"classes must be in 0\.\.2, got 3"),
        ({"class_labels": [0]}, "one for each of the 2 images, got 1"),
        ({"class_labels": "cow"}, "class_labels must be numbers or some of 0, 1, 2, got 'cow'"),
        ({"class_labels": [0, "cow"]}, "got 'cow'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"guidance_scale": float("nan")}, "guidance must be a finite number, got nan"),
        ({"generator": 3}, "generator must be a torch.Generator or a list of one per image, got 3. A number goes into"),
        ({"generator": [torch.Generator()]}, "one for each of the 2 images, got 1"),
        ({"output_type": "latent"}, "output_type must be one of pil, np, pt, got 'latent'"),
    ],
)
def test_impossible_requests_are_refused(options: dict[str, Any], message: str) -> None:
    network, _ = networks("unet")
    pipeline = quiet(DIAPipeline(network, DDIMScheduler(), id2label={0: "0", 1: "1", 2: "2"}))
    with pytest.raises(ValueError, match=message):
        pipeline(**{"batch_size": 2, **options})


def test_classes_and_guidance_need_a_network_that_knows_them(tmp_path: Path) -> None:
    pipeline = exported(tiny_task(), tmp_path)
    for options in ({"class_labels": 1}, {"class_labels": "cat"}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="needs a conditional task"):
            pipeline(1, **options)
    unguided = exported(tiny_task(conditional=True, label_dropout=0.0), tmp_path / "unguided")
    with pytest.raises(ValueError, match="guidance_scale=2 needs a network that was also trained without the class"):
        unguided(1, guidance_scale=2)


def test_pictures_need_one_or_three_channels(tmp_path: Path) -> None:
    pipeline = exported(tiny_task(attention="dia-lstm", image_shape=[2, 8, 8]), tmp_path)
    with pytest.raises(ValueError, match="output_type='pil' needs images of 1 or 3 channels, got 2"):
        pipeline(1)
    assert made(pipeline, 1, num_inference_steps=2).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("names", [None, {0: "cat"}, {1: "a", 2: "b", 3: "c"}])
def test_names_have_to_fit_the_network(kind: str, names: dict[int, str] | None) -> None:
    network, _ = networks(kind)
    with pytest.raises(ValueError, match="name the network's 3 classes by number, starting at 0"):
        DIAPipeline(network, DDIMScheduler(), id2label=names)
    with pytest.raises(ValueError, match="every class a different name"):
        DIAPipeline(network, DDIMScheduler(), id2label={0: "a", 1: "a", 2: "b"})


def test_without_diffusers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "dia_lightning.models.pipelines")
    with pytest.raises(ImportError, match=r'pip install "dia-lightning\[diffusion\]"'):
        import dia_lightning.models.pipelines  # noqa: F401


# ---- what is exported


@pytest.mark.parametrize("options", [{}, {"attention": "dia-lstm"}, {"attention": "dia-lstm", "conditional": True}])
def test_the_snippet_runs_and_the_predictions_agree(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export_pipeline(tiny_task(timesteps=30, **options), "model")
    assert result.difference < 1e-6
    names: dict[str, Any] = {}
    exec(result.snippet, names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 4


def test_the_difference_shows_weights_that_were_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task(attention="dia-lstm")
    save = DIAUNet2DModel.save_pretrained

    def save_changed(network: Any, *args: Any, **options: Any) -> None:
        nn.init.zeros_(network.conv_out.weight)
        save(network, *args, **options)

    monkeypatch.setattr(DIAUNet2DModel, "save_pretrained", save_changed)
    assert export_pipeline(task, tmp_path / "model").difference > 1e-3


def test_the_task_stays_as_it_is(tmp_path: Path) -> None:
    task = tiny_task(attention="dia-lstm", gradient_checkpointing=True).train()
    task.backbone.mid_block.eval()
    modes = [module.training for module in task.modules()]
    before = {name: value.clone() for name, value in task.state_dict().items()}
    export_pipeline(task, tmp_path / "model")
    assert [module.training for module in task.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_network_of_diffusers_that_was_given_as_an_object_is_exported(kind: str, tmp_path: Path) -> None:
    network, _ = networks(kind)
    task = tiny_task(network, conditional=True, attention="dia-lstm")
    pipeline = exported(task, tmp_path)
    assert torch.equal(made(pipeline, 2, num_inference_steps=2), task.sample(2, steps=2))
    again = tiny_task(pipeline.unet, conditional=True)  # one that already has attention
    assert torch.equal(made(exported(again, tmp_path / "again"), 2, num_inference_steps=2), again.sample(2, steps=2))


class Doubling(nn.Module):
    """A custom attention module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 2.0))

    def forward(self, features: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.scale, state


class Echo(nn.Module):
    """A custom network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        return self.weight * images


def plain_unet(**options: Any) -> nn.Module:
    return get_denoiser("unet", **{"image_shape": (1, 8, 8), **UNET, **options})


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (lambda: "unet", {"attention": Doubling}, r"attention was given as an object \(.*object:Doubling"),
        (Echo, {}, "must be a UNet2DModel or a DiTTransformer2DModel of diffusers to become a pipeline, got Echo"),
        (lambda: attach(plain_unet(), Doubling), {}, "differ from those of a UNet2DModel built from its config"),
        (lambda: plain_unet(image_shape=(1, 16, 16)), {}, r"shape \[1, 16, 16\], but the task needs \[1, 8, 8\]"),
        (
            lambda: UNet2DModel(
                in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
                down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            ),
            {},
            "The config of the network has no sample_size",
        ),
    ],
)  # fmt: skip
def test_what_no_config_describes_is_refused_before_anything_is_written(
    backbone: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_pipeline(tiny_task(backbone(), **options), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_export_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> float:
        raise OSError("disk full")

    monkeypatch.setattr("dia_lightning.tasks._pipeline_export._difference", fail)
    with pytest.raises(OSError, match="disk full"):
        export_pipeline(tiny_task(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    task = tiny_task()
    (tmp_path / "model").mkdir()
    export_pipeline(task, tmp_path / "model")  # an empty folder is as good as none
    (tmp_path / "file").write_text("mine")
    for name in ("model", "file"):
        with pytest.raises(ValueError, match=r"exists already, and nothing is overwritten\. Give a new folder"):
            export_pipeline(task, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".safetensors"])
def test_the_name_of_a_file_is_refused(ending: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"written to a folder, got .*model{ending}'. Omit {ending}: .*model'"):
        export_pipeline(tiny_task(), tmp_path / f"model{ending}")


def test_a_plain_transformer_is_one_of_diffusers(tmp_path: Path) -> None:
    pipeline = exported(tiny_task("dit", conditional=True), tmp_path)
    assert type(pipeline.unet) is DiTTransformer2DModel
