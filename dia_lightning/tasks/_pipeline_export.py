"""A diffusion task as a diffusers pipeline."""

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning._evaluating import evaluating
from dia_lightning._hyperparameters import OBJECT
from dia_lightning.models import Exported
from dia_lightning.models.denoisers import predict, require_diffusers
from dia_lightning.tasks.attention_options import AttentionOptions
from dia_lightning.tasks.diffusion import DiffusionTask

_STOCK_SNIPPET = (
    "from diffusers import DDIMPipeline  # or DDPMPipeline, for all {timesteps} steps\n"
    "pipe = DDIMPipeline.from_pretrained({path!r})\n"
    "images = pipe(batch_size=4, num_inference_steps={steps}{output}).images"
)
_SNIPPET = (
    "from dia_lightning.models.pipelines import DIAPipeline\n"
    "pipe = DIAPipeline.from_pretrained({path!r})\n"
    "images = pipe(batch_size=4, {conditions}num_inference_steps={steps}, seed=0{output}).images"
)
#: File suffixes that classifiers are exported to.
_FILES = (".onnx", ".pt2", ".safetensors")


def export_pipeline(task: DiffusionTask, folder: str | Path) -> Exported:
    """Write a task as a diffusers pipeline, load it again, and compare predictions.

    An unconditional plain U-Net becomes diffusers' own ``DDPMPipeline``, which loads without this package; anything
    else becomes a :class:`~dia_lightning.models.pipelines.DIAPipeline`.

    Args:
        task: the task; its network is not changed.
        folder: a new or empty folder to write to.

    Returns:
        What was written, and how well predictions of noisy images agree.

    Raises:
        ValueError: if the folder is not empty, looks like a file, or no config can describe the network.
        ImportError: if diffusers is not installed.

    Example:
        >>> import tempfile
        >>> network = {"block_out_channels": [16, 32], "layers_per_block": 1}
        >>> task = DiffusionTask("unet", image_shape=[1, 8, 8], backbone_args=network, attention="dia-lstm")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export_pipeline(task, folder)
        >>> exported.difference < 1e-5
        True
    """
    folder = Path(folder)
    _check_new(folder)
    require_diffusers()
    pipeline = _pipeline(task)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        made = Path(unfinished, folder.name)
        pipeline.save_pretrained(made)
        difference = _difference(task, type(pipeline).from_pretrained(made).unet)
        made.replace(folder)  # whole or not at all
    return Exported(folder, difference, _snippet(task, folder, pipeline))


def _check_new(folder: Path) -> None:
    if folder.suffix in _FILES:
        raise ValueError(
            f"A diffusion task is written to a folder, got {str(folder)!r}. Omit {folder.suffix}: "
            f"{str(folder.with_suffix(''))!r}."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists already, and nothing is overwritten. Give a new folder.")


def _pipeline(task: DiffusionTask) -> Any:
    from diffusers import DDPMPipeline, UNet2DModel  # takes seconds to import, and need not be installed

    from dia_lightning.models.pipelines import DIAPipeline

    network = _rebuilt(task)
    timesteps = task.noise.timesteps
    if type(network) is UNet2DModel and task.no_class is None:
        # with all steps, as DDPMPipeline expects
        return DDPMPipeline(network, task.noise.sampler("ddpm", timesteps))
    names = None
    if task.no_class is not None:
        known = task.class_names or []
        names = dict(enumerate(known if len(known) == task.no_class else map(str, range(task.no_class))))
    scheduler = task.noise.sampler("ddim", timesteps)
    return DIAPipeline(network, scheduler, id2label=names, supports_guidance=task.label_dropout > 0)


def _rebuilt(task: DiffusionTask) -> Any:
    """Return a copy of the network on the CPU, of a class whose config describes it."""
    from diffusers import DiTTransformer2DModel, UNet2DModel

    from dia_lightning.models import pipelines

    attached = {
        UNet2DModel: pipelines.DIAUNet2DModel,
        DiTTransformer2DModel: pipelines.DIADiTTransformer2DModel,
    }
    network, names = task.backbone, [field.name for field in fields(AttentionOptions)]
    attention = {name: task.hparams[name] for name in names if name in task.hparams}
    if OBJECT in repr(attention):
        raise ValueError(
            f"The attention was given as an object ({attention}), which no config can hold. Register it "
            "(register_attention) and train with its name."
        )
    kind = type(network)
    if kind not in (*attached, *attached.values()):
        raise ValueError(
            f"The backbone must be a UNet2DModel or a DiTTransformer2DModel of diffusers to become a pipeline, got "
            f"{kind.__name__}. Export its weights instead, with torch.save."
        )
    shape = pipelines.image_shape_of(network)
    if shape != task.shape:
        raise ValueError(
            f"The backbone's config makes images of the shape {list(shape)}, but the task needs "
            f"{list(task.shape)}. Build the backbone with in_channels and sample_size of the images."
        )
    dia = AttentionOptions(**attention).arguments()
    if dia["attention"] is None:
        rebuilt = kind.from_config(network.config)
    else:
        rebuilt = attached[kind].from_config(network.config, dia=dia)
    try:
        rebuilt.load_state_dict(network.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"The backbone's weights differ from those of a {type(rebuilt).__name__} built from its config: it was "
            "changed by hand. "
            "Let the task attach the attention (attention=...)."
        ) from error
    return rebuilt


def _difference(task: DiffusionTask, loaded: Any) -> float:
    """Return the largest difference between two networks' predictions of random noisy images."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(task.backbone.parameters())
    images = torch.randn(2, *task.shape, generator=generator).to(parameter.device, parameter.dtype)
    timesteps = torch.randint(task.noise.timesteps, (2,), generator=generator).to(parameter.device)
    labels = None if task.no_class is None else torch.tensor([0, task.no_class], device=parameter.device)

    def prediction(network: Any) -> Tensor:
        with evaluating(network):
            return predict(network, images, timesteps, labels)

    nn.Module.to(loaded, parameter.device, parameter.dtype)  # diffusers' own warns even about float32
    return float((prediction(task.backbone) - prediction(loaded)).abs().max())


def _snippet(task: DiffusionTask, folder: Path, pipeline: Any) -> str:
    total = task.noise.timesteps
    steps = max((number for number in range(2, 26) if total % number == 0), default=total)
    template = _SNIPPET if hasattr(pipeline, "labels") else _STOCK_SNIPPET
    conditions = "" if task.no_class is None else f"class_labels={next(iter(pipeline.labels))!r}, "
    output = "" if task.shape[0] in (1, 3) else ', output_type="np"'  # others are not displayable
    return template.format(path=str(folder), timesteps=total, steps=steps, conditions=conditions, output=output)
