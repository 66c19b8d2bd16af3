"""Trained denoisers as diffusers pipelines, which load in one line.

diffusers writes the path of this module into its pipeline folders, and finds the classes here again.
"""

import inspect
import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dia_lightning import _hub
from dia_lightning._choices import check_choice
from dia_lightning._evaluating import evaluating
from dia_lightning._extras import needed_by
from dia_lightning.attention import attach, is_attached, plain_class
from dia_lightning.attention.description import arguments_of, descriptions
from dia_lightning.models import denoising
from dia_lightning.models._pipeline_index import check_index, check_network
from dia_lightning.models.denoisers import keep_labels

with needed_by("Diffusion"):
    from diffusers import (
        ConfigMixin,
        DDIMScheduler,
        DDPMScheduler,
        DiffusionPipeline,
        DiTTransformer2DModel,
        ImagePipelineOutput,
        ModelMixin,  # diffusers asks this module for it, to find out how its networks are loaded
        SchedulerMixin,
        UNet2DModel,
    )

_OUTPUT_TYPES = ("pil", "np", "pt")


class _Attached(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is only partly typed
    """Base of diffusers networks with attention: the config holds the arguments of ``attach``."""

    def __init__(self, *, dia: Mapping[str, Any] | None = None, dia_loads_with: str = "", **network: Any) -> None:
        super().__init__(**network)  # `dia_loads_with` is for users of a class that leaves attention out
        if dia is None:
            raise ValueError(
                f"{type(self).__name__} needs the arguments of attach, as dia={{'attention': 'dia-lstm'}}; the config "
                "of a plain network has none. Load it with the diffusers class and call attach(network, ...)."
            )
        attach(self, **arguments_of(dia, {}, f"{type(self).__name__}.from_pretrained(folder, dia={{'NAME': ...}})"))
        self.register_to_config(dia=descriptions(self)[""])

    def _fix_state_dict_keys_on_load(self, state_dict: Any) -> None:
        super()._fix_state_dict_keys_on_load(state_dict)
        for path, module in self.named_modules():
            if hasattr(module, "dia_rename"):
                module.dia_rename(state_dict, f"{path}." if path else "")

    @staticmethod
    def _get_init_keys(network: type) -> set[str]:
        """Return which config entries are arguments; diffusers itself only looks at the last class."""
        return {name for kind in network.__mro__ for name in inspect.signature(kind.__init__).parameters}  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, output_loading_info: bool = False, **options: Any) -> Any:
        """Load a network from a folder, as diffusers does, and refuse a file that lacks some of its weights.

        Args:
            path: the folder.
            output_loading_info: whether to also return the loading info of diffusers.
            **options: options of ``ModelMixin.from_pretrained``, for example ``torch_dtype``.

        Raises:
            ValueError: if the file lacks the weights of the attention, or does not match the network.
        """
        check_network(Path(path, options.get("subfolder") or ""))
        options = {"use_safetensors": True, **options}  # others may hold code
        network, found = super().from_pretrained(path, output_loading_info=True, **options)
        strange = sorted({*found["missing_keys"], *found["unexpected_keys"]})
        if strange:  # missing weights would be left as uninitialised memory
            raise ValueError(
                f"The weights in {str(path)!r} are not those of a {cls.__name__} with dia={network.config.dia} "
                f"({len(strange)} differ, the first: {strange[0]}). Load plain weights with the diffusers class, "
                "then call attach(network, ...)."
            )
        return (network, found) if output_loading_info else network


class DIAUNet2DModel(_Attached, UNet2DModel):  # type: ignore[misc]
    """diffusers' ``UNet2DModel`` with attention, saved and loaded in the same way.

    Args:
        dia: arguments of :func:`~dia_lightning.attention.attach`: ``{"attention": "dia-lstm", "share": "stage", ...}``.
        **network: arguments of ``UNet2DModel``.

    Raises:
        ValueError: if ``dia`` is missing or cannot be attached.

    Example:
        >>> import tempfile
        >>> network = DIAUNet2DModel(
        ...     sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        ...     up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, dia={"attention": "dia-lstm"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     network.save_pretrained(folder)
        ...     loaded = DIAUNet2DModel.from_pretrained(folder)
        >>> loaded.config.dia
        {'attention': 'dia-lstm'}
    """


class DIADiTTransformer2DModel(_Attached, DiTTransformer2DModel):  # type: ignore[misc]
    """diffusers' ``DiTTransformer2DModel`` with attention, saved and loaded in the same way.

    It does not drop labels in training.

    Args:
        dia: arguments of :func:`~dia_lightning.attention.attach`: ``{"attention": "dia-lstm", "share": "stage", ...}``.
        **network: arguments of ``DiTTransformer2DModel``.

    Raises:
        ValueError: if ``dia`` is missing or cannot be attached.

    Example:
        >>> network = DIADiTTransformer2DModel(
        ...     sample_size=8, in_channels=1, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        ...     num_embeds_ada_norm=10, dia={"attention": "dia-lstm"})
        >>> [name for name, _ in network.named_modules() if name.endswith(".dia")]
        ['transformer_blocks.0.dia']
    """

    def __init__(self, *, dia: Mapping[str, Any] | None = None, **network: Any) -> None:
        super().__init__(dia=dia, **network)
        keep_labels(self)


#: diffusers classes, with those that load them with the attention described in their config.
_ATTACHED = {UNet2DModel: DIAUNet2DModel, DiTTransformer2DModel: DIADiTTransformer2DModel}


class DIAPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Generates images with a trained denoiser, with or without attention, conditional or not.

    ``dia-lightning export`` writes the folders it loads. It produces the images of
    :meth:`~dia_lightning.tasks.DiffusionTask.sample` and takes the same arguments under the names used by diffusers
    pipelines.

    Samplers are swapped as in diffusers: ``pipe.scheduler = DPMSolverMultistepScheduler.from_config(
    pipe.scheduler.config, timestep_spacing="linspace")``. A scheduler with ``thresholding`` but no ``clip_sample``
    always runs with thresholding at 1: otherwise pixels drift off at high noise levels.

    Args:
        unet: the network, a U-Net or a transformer.
        scheduler: a diffusers scheduler with the noise schedule that the network was trained with. A ``DDPMScheduler``
            becomes a ``DDIMScheduler``, as in ``DDIMPipeline``; for ancestral sampling set ``pipe.scheduler``.
        id2label: for a conditional network, names of its K classes by number 0..K - 1.
        supports_guidance: whether a conditional network was also trained without the class.

    Raises:
        ValueError: if ``id2label`` does not match the network.
        ImportError: if diffusers is not installed.

    Example:
        >>> import tempfile
        >>> from diffusers import DDIMScheduler
        >>> network = DIAUNet2DModel(
        ...     sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        ...     up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, num_class_embeds=3, dia={"attention": "dia-lstm"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     DIAPipeline(network, DDIMScheduler(), id2label={0: "cat", 1: "dog"}).save_pretrained(folder)
        ...     pipe = DIAPipeline.from_pretrained(folder)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe(class_labels=["cat", "dog"], num_inference_steps=2, guidance_scale=1.5, seed=0).images
        >>> [image.size for image in images]
        [(8, 8), (8, 8)]
    """

    def __init__(
        self,
        unet: UNet2DModel | DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
        supports_guidance: bool = True,
    ) -> None:
        super().__init__()
        # JSON turns the numbers into strings
        names = {int(label): name for label, name in (id2label or {}).items()}
        _check_names(names, unet.config)
        if unet.config.get("dia") and not is_attached(unet):
            raise ValueError(
                f"This {type(unet).__name__} was loaded without the attention that its config describes "
                f"(dia={unet.config.dia}). Load it with dia_lightning.models.from_pretrained and pass it: unet=..."
            )
        if isinstance(scheduler, DDPMScheduler):
            scheduler = DDIMScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        kind = _ATTACHED.get(plain_class(unet))
        if kind is not None and is_attached(unet):  # the diffusers class would leave the attention out
            self.register_to_config(unet=(kind.__module__, kind.__name__))
        if id2label is not None:  # other pipelines warn about unknown entries
            self.register_to_config(id2label=names, supports_guidance=supports_guidance)
        #: Class numbers by name.
        self.labels = {name: label for label, name in names.items()}
        self.no_class = len(names) or None
        self.supports_guidance = supports_guidance

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Any:
        """Load a pipeline, as diffusers does, including attention saved by a diffusers pipeline.

        Args:
            path: the folder, or a Hugging Face Hub repository.
            **options: options of ``DiffusionPipeline.from_pretrained``, for example ``torch_dtype``.

        Raises:
            ValueError: if the weights do not match the network's config, or the folder names classes other than those
                written by this package, diffusers' networks and its schedulers.
        """
        folder = _fetched(path, options)
        check_index(folder, options)
        config = folder / "unet" / "config.json"
        if "unet" not in options and config.is_file():
            found = json.loads(config.read_text(encoding="utf-8"))
            kinds = {plain.__name__: attached for plain, attached in _ATTACHED.items()}
            if "dia" in found and found.get("_class_name") in kinds:
                chosen = {name: options[name] for name in ("torch_dtype", "variant") if name in options}
                options["unet"] = kinds[found["_class_name"]].from_pretrained(config.parent, **chosen)
        return super().from_pretrained(folder, **{"use_safetensors": True, **options})

    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 25,
        seed: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Any:
        """Generate images.

        Args:
            batch_size: number of images, all at once; by default one per class label, or 1.
            class_labels: for a conditional network, the class of all images or of each, by number or name; ``None``
                cycles through the classes.
            guidance_scale: weight of the class: 1 is no guidance, more makes images more typical and less diverse, 0
                ignores the class. Values other than 1 run the network twice.
            num_inference_steps: how often the network runs per image; for DDIM and DDPM a divisor of the number of
                timesteps.
            seed: 0 or more. Image i depends only on ``seed`` and i, as in ``DiffusionTask.sample``: the images are the
                same for any batch size and device, up to rounding.
            output_type: ``"pil"``, ``"np"`` (``[B, H, W, C]`` in [0, 1]) or ``"pt"`` (``[B, C, H, W]`` in [0, 1]).
            return_dict: whether to return an ``ImagePipelineOutput`` or a tuple of the images.
            generator: source of the noise instead of ``seed``, as in diffusers pipelines: one for all images, or a list
                of one per image.

        Returns:
            The images, as ``.images`` or as the first item.

        Raises:
            ValueError: if a number is out of range or does not suit the network.
        """
        shape = image_shape_of(self.unet)
        _check_output_type(output_type, channels=shape[0])
        chosen = self._numbers(class_labels)
        count = (len(chosen) if isinstance(chosen, list) else 1) if batch_size is None else batch_size
        denoising.check_least("batch_size", count, 1)
        generators = _checked(generator, count)
        if guidance_scale != 1 and self.no_class is not None and not self.supports_guidance:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a network that was also trained without the class."
            )
        sampling = denoising.Denoising(
            self.unet,
            lambda: self._new_scheduler(num_inference_steps),
            guidance=guidance_scale,
            no_class=self.no_class,
            seed=seed,
        )
        labels = denoising.class_labels(count, chosen, first=0, no_class=self.no_class)
        labels = None if labels is None else labels.to(self.unet.device)
        with self.progress_bar(total=sampling.steps) as bar, evaluating(self.unet):
            images = sampling.run(range(count), labels, shape, after_step=bar.update, generator=generators)
        found: Any = images
        if output_type != "pt":
            found = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            found = self.numpy_to_pil(found)
        return ImagePipelineOutput(images=found) if return_dict else (found,)

    def _numbers(self, labels: int | str | Sequence[int | str] | None) -> int | list[int] | None:
        """Return classes by number."""
        if labels is None or self.no_class is None or isinstance(labels, int):
            return labels  # type: ignore[return-value]  # names of an unconditional network are refused later
        if isinstance(labels, str):
            return self._number(labels)
        return [self._number(label) for label in labels]

    def _number(self, label: int | str) -> int:
        if label in self.labels:
            return self.labels[str(label)]
        try:
            return operator.index(label)  # type: ignore[arg-type]  # also numpy and torch numbers
        except TypeError:
            names = ", ".join(self.labels)
            raise ValueError(f"class_labels must be numbers or some of {names}, got {label!r}.") from None

    def _new_scheduler(self, steps: int) -> Any:
        kind, config = type(self.scheduler), self.scheduler.config
        known, total = inspect.signature(kind.__init__).parameters, config.num_train_timesteps
        denoising.check_least("num_inference_steps", steps, 1)
        if steps > total:
            raise ValueError(f"num_inference_steps must be at most the {total} timesteps of the network, got {steps}.")
        changed: dict[str, Any] = {}
        if "thresholding" in known and "clip_sample" not in known:
            changed = {"thresholding": True, "sample_max_value": 1.0}
        elif kind is DDPMScheduler and steps == total:  # as DiffusionTask.sample does
            changed = {"variance_type": denoising.ddpm_variance(steps, total)}
        scheduler = kind.from_config(config, **changed)
        if isinstance(scheduler, (DDIMScheduler, DDPMScheduler)) and scheduler.config.timestep_spacing == "leading":
            denoising.check_divides(
                steps, total, sampler=kind.__name__, otherwise="another scheduler, such as DPM-Solver++"
            )
        scheduler.set_timesteps(steps)
        return scheduler


def _fetched(path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """Return the folder of a pipeline, downloaded if needed, and remove the download options."""
    where: dict[str, Any] = {name: options.pop(name, None) for name in ("revision", "token", "cache_dir")}
    is_local = bool(options.pop("local_files_only", False))
    return _hub.fetch(path, **where, local_files_only=is_local, patterns=["*.json", "*.safetensors"])


def image_shape_of(network: Any) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the images of a diffusers network, from its config.

    Raises:
        ValueError: if the config lacks it.
    """
    channels, size = network.config.in_channels, network.config.sample_size
    if size is None:
        raise ValueError("The config of the network has no sample_size. Build it with sample_size=(H, W).")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def _check_names(names: Mapping[int, str], config: Mapping[str, Any]) -> None:
    transformer = "num_embeds_ada_norm" in config
    classes = config["num_embeds_ada_norm"] if transformer else (config["num_class_embeds"] or 1) - 1
    if transformer and classes == 1 and not names:  # diffusers has no transformer without labels
        return
    if sorted(names) != list(range(classes)):
        raise ValueError(
            f"id2label must name the network's {classes} classes by number, starting at 0, got {dict(names)}."
        )
    if len(set(names.values())) < len(names):
        raise ValueError(f"id2label must give every class a different name, got {dict(names)}.")


def _checked(generator: Any, count: int) -> torch.Generator | list[torch.Generator] | None:
    """Return one generator for all images, or a list of one for each."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    several = list(generator) if isinstance(generator, list | tuple) else []
    if not several or not all(isinstance(each, torch.Generator) for each in several):
        raise ValueError(
            f"generator must be a torch.Generator or a list of one per image, got {generator!r:.100}. A number goes "
            "into seed."
        )
    if len(several) != count:
        raise ValueError(f"generator must be one for all or one for each of the {count} images, got {len(several)}.")
    return several


def _check_output_type(output_type: str, *, channels: int) -> None:
    check_choice("output_type", output_type, _OUTPUT_TYPES)
    if output_type == "pil" and channels not in (1, 3):
        raise ValueError(f"output_type='pil' needs images of 1 or 3 channels, got {channels}. Take 'np' or 'pt'.")
