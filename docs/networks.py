"""Writes networks.md: python -m docs.networks, from the root of the repository."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from dia_lightning.attention import Stages, find_sites
from dia_lightning.models import build_on_meta
from tests.attention.families import FAMILIES, NO_BRANCH

Builder = Callable[[], nn.Module]

HEAD = """\
# Networks

Where `attach(network, ...)` puts attention by default, found by running each network once. Sites are the layers that
end a residual branch; stages are the groups of blocks that share a unit: "3+4" means three sites in the first stage and
four in the second. "left out" counts the blocks whose addition is of another kind or whose branch does not end in a
layer, with the reason. Linear branches, and additions of two equally deep sides, are position encodings or the arms of
RepVGG blocks, which are merged for inference.

For the names of the layers use `dia-lightning sites NAME`, with names from `dia-lightning models`, or
`print(find_sites(network))` for any network. `attach(..., sites=[...])` also accepts layers that are left out here.
`python -m docs.networks` generates this page.

"""

HEAVY = ("detection", "segmentation")
TORCHVISION = {
    "classification": (
        *("convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
        *(
            "maxvit_t",
            "mnasnet0_5",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "regnet_y_400mf",
            "resnet18",
            "resnext50_32x4d",
        ),
        *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_16", "wide_resnet50_2"),
    ),
    "segmentation": ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"),
    "video": ("mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t"),
    "detection": (
        *("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "fcos_resnet50_fpn"),
        *("keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
        *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
    ),
    "quantization": (
        *("quantized_googlenet", "quantized_inception_v3", "quantized_mobilenet_v2", "quantized_mobilenet_v3_large"),
        *("quantized_resnet18", "quantized_resnext101_32x8d", "quantized_shufflenet_v2_x0_5"),
    ),
}
DIFFUSERS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {},
    "UNet2DConditionModel": {},
    "DiTTransformer2DModel": {},
    "SD3Transformer2DModel": {},
    "AutoencoderKL": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    },
}
#: Network by configuration.
TRANSFORMERS = {
    "ViTConfig": "ViTModel",
    "DeiTConfig": "DeiTModel",
    "BeitConfig": "BeitModel",
    "SwinConfig": "SwinModel",
    "SegformerConfig": "SegformerModel",
    "ConvNextV2Config": "ConvNextV2Model",
    "Dinov2Config": "Dinov2Model",
    "ResNetConfig": "ResNetModel",
    "BertConfig": "BertModel",
}


def main() -> None:
    """Write the file."""
    parts = [(library, list(rows)) for library, rows in _tables() if find_spec(library) is not None]
    text = HEAD + "| library | version | networks below | with attention |\n|---|---|---|---|\n"
    for library, rows in parts:
        taken = sum(has_sites for has_sites, _ in rows)
        text += f"| {library} | {version(library).partition('+')[0]} | {len(rows)} | {taken} |\n"
    for library, rows in parts:
        text += f"\n## {library}\n\n{NOTES[library]}\n\n"
        text += "| network | blocks | sites | stages | left out |\n|---|---|---|---|---|\n"
        text += "".join(f"{row}\n" for _, row in rows)
    Path(__file__).with_suffix(".md").write_text(text)


NOTES = {
    "timm": f"One network per family (a file of timm's code): {len(FAMILIES)} of {len(FAMILIES) + len(NO_BRANCH)} "
    "take attention. It is the family's smallest network in which blocks share a unit, if there is one.",
    "torchvision": "One network per family. For detectors, the sites are those of the backbone.",
    "diffusers": "Each class with its default sizes. `branches` adds the attention blocks of U-Nets.",
    "transformers": "Each class with its default sizes.",
}


def _tables() -> Iterator[tuple[str, Iterator[tuple[bool, str]]]]:
    yield "timm", (_row(f"{family}: {name}", partial(_timm, name)) for family, name in _families())
    yield (
        "torchvision",
        (
            _row(f"{kind}: {name}", partial(_torchvision, kind, name))
            for kind, names in TORCHVISION.items()
            for name in names
        ),
    )
    yield "diffusers", (_row(name, partial(_diffusers, name, options)) for name, options in DIFFUSERS.items())
    yield "transformers", (_row(name, partial(_transformers, name, config)) for config, name in TRANSFORMERS.items())


def _families() -> list[tuple[str, str]]:
    return sorted((family, name) for family, (name, _) in {**FAMILIES, **NO_BRANCH}.items())


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)  # type: ignore[no-any-return]


def _torchvision(kind: str, name: str) -> nn.Module:
    from torchvision import models

    options = {"weights_backbone": None} if kind in HEAVY else {}
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def _diffusers(name: str, options: dict[str, Any]) -> nn.Module:
    return getattr(import_module("diffusers"), name)(**options)  # type: ignore[no-any-return]


def _transformers(name: str, config: str) -> nn.Module:
    library = import_module("transformers")
    return getattr(library, name)(getattr(library, config)())  # type: ignore[no-any-return]


def _row(name: str, build: Builder) -> tuple[bool, str]:
    network = build_on_meta(build)
    try:
        stages = find_sites(network)
    except ValueError:
        return False, f"| {name} | | 0 | | it does not run on a batch of images |"
    blocks = {type(network.get_submodule(site.block)).__name__: None for stage in stages for site in stage}
    sizes = [str(len(stage)) for stage in stages]
    cells = [name, ", ".join(blocks), str(sum(map(len, stages))), "+".join(sizes), _left_out(stages)]
    return bool(stages), f"| {' | '.join(cells)} |"


def _left_out(stages: Stages) -> str:
    found = "; ".join(f"{len(blocks)}: {reason.partition(', as ')[0]}" for reason, blocks in stages.reasons())
    found = re.sub(r"'([^']+)'", r"`\1`", found)  # so that stars in paths are not read as emphasis
    return found or ("" if stages else "no addition of a branch to a shortcut")


if __name__ == "__main__":
    main()
