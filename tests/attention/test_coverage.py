"""Sites are found in networks of all kinds, without a rule for any of them."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from timm.models._registry import _model_to_module
from torch import nn
from torchvision import models

from dia_lightning.attention import Stages, find_sites
from dia_lightning.attention._found_sites import branch_sites
from dia_lightning.attention._named_sites import sites_by_rules
from dia_lightning.attention._site_table import BLOCK_RULES, rule_of
from dia_lightning.attention._sites import in_stages, width_and_positions
from dia_lightning.attention._trace import trace
from dia_lightning.models import build_on_meta
from tests.attention.families import FAMILIES, NO_BRANCH
from tests.attention.libraries import NETWORKS, build


def per_stage(stages: Stages) -> str:
    return "+".join(str(len(stage)) for stage in stages)


def test_every_family_of_timm_is_covered() -> None:
    families = {module.rpartition(".")[2] for module in _model_to_module.values()}
    assert families <= {*FAMILIES, *NO_BRANCH}
    assert len(FAMILIES) >= 88


@pytest.mark.parametrize("family", FAMILIES)
def test_the_branches_of_a_family_of_timm_are_found(family: str) -> None:
    name, expected = FAMILIES[family]
    assert per_stage(find_sites(build_on_meta(partial(timm.create_model, name)))) == expected


def test_the_page_of_networks_has_the_same_sites() -> None:
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    for family, (name, stages) in FAMILIES.items():
        assert re.search(rf"^\| {family}: {name} \| .+ \| {re.escape(stages)} \|", page, re.MULTILINE), family


@pytest.mark.parametrize("family", NO_BRANCH)
def test_families_of_timm_without_residual_branches_are_recognised(family: str) -> None:
    name, _ = NO_BRANCH[family]
    assert find_sites(build_on_meta(partial(timm.create_model, name))) == []


# ---- torchvision

#: By the start of the name; all others have residual branches.
WITHOUT_BRANCHES = (
    *("alexnet", "vgg", "squeezenet", "densenet", "googlenet", "inception", "shufflenet", "s3d", "ssd300"),
    *("quantized_googlenet", "quantized_inception", "quantized_shufflenet"),
)
#: One of each kind.
QUICK = {
    "convnext_tiny": "3+3+9+3",
    "deeplabv3_mobilenet_v3_large": "1+1+2+3+1+2",
    "efficientnet_b0": "1+1+2+2+3",
    "efficientnet_v2_s": "2+3+3+5+8+14",
    "fasterrcnn_resnet50_fpn": "3+4+6+3",
    "fcn_resnet50": "3+4+6+3",
    "lraspp_mobilenet_v3_large": "1+1+2+3+1+2",
    "maxvit_t": "10+10+25+10",
    "mc3_18": "2+2+2+2",
    "mnasnet0_5": "2+2+2+1+3",
    "mobilenet_v2": "1+2+3+2+2",
    "mobilenet_v3_small": "1+2+1+2",
    "mvit_v2_s": "2+4+22+4",
    "quantized_mobilenet_v2": "1+2+3+2+2",
    "quantized_resnet18": "2+2+2+2",
    "r2plus1d_18": "2+2+2+2",
    "r3d_18": "2+2+2+2",
    "regnet_y_400mf": "1+3+6+6",
    "resnet50": "3+4+6+3",
    "resnext50_32x4d": "3+4+6+3",
    "ssdlite320_mobilenet_v3_large": "1+1+2+3+1+2",
    "swin3d_t": "4+4+12+4",
    "swin_t": "4+4+12+4",
    "swin_v2_t": "4+4+12+4",
    "vit_b_16": "24",
    "wide_resnet50_2": "3+4+6+3",
}


def built(name: str) -> nn.Module:
    is_dense = name in {*models.list_models(module=models.segmentation), *models.list_models(module=models.detection)}
    options = {"weights": None, **({"weights_backbone": None} if is_dense else {})}
    network: nn.Module = build_on_meta(partial(models.get_model, name, **options))
    return network


def classes_of(network: nn.Module) -> frozenset[type[nn.Module]]:
    return frozenset(type(module) for module in network.modules())


def of_torchvision(name: str) -> Stages:
    return find_sites(built(name))


@pytest.mark.parametrize("name", QUICK)
def test_the_branches_of_a_network_of_torchvision_are_found(name: str) -> None:
    assert per_stage(of_torchvision(name)) == QUICK[name]


@pytest.mark.slow
def test_all_kinds_of_residual_networks_of_torchvision_have_sites() -> None:
    names = [name for name in models.list_models() if not name.startswith(("raft", *WITHOUT_BRANCHES))]
    assert len(names) >= 90
    seen = {classes_of(built(name)) for name in QUICK}
    for name in names:
        network = built(name)
        if classes_of(network) not in seen:  # networks of the same classes differ in widths and numbers of blocks
            seen.add(classes_of(network))
            assert find_sites(network), name


@pytest.mark.parametrize(
    "name", ["alexnet", "vgg11", "squeezenet1_1", "densenet121", "googlenet", "inception_v3", "shufflenet_v2_x0_5"]
)
def test_networks_of_torchvision_without_residual_branches_are_recognised(name: str) -> None:
    assert of_torchvision(name) == []


# ---- diffusers

HEADS = {"num_attention_heads": 4, "attention_head_dim": 16, "caption_projection_dim": 64}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
DIFFUSERS: dict[str, tuple[Callable[[], Any], str]] = {
    # 2 blocks on the way down at each of 4 resolutions, 2 in the middle, 3 on the way up; attention is left out
    "UNet2DModel": (UNet2DModel, "2+2+2+7+3+3+3"),
    "UNet2DConditionModel": (UNet2DConditionModel, "2+2+2+7+3+3+3"),
    "DiTTransformer2DModel": (partial(DiTTransformer2DModel, sample_size=32, num_layers=4), "8"),
    # images and text have two branches in each block, but in the last block text has none
    "SD3Transformer2DModel": (partial(SD3Transformer2DModel, num_layers=3, **HEADS), "6+4"),
    "AutoencoderKL": (partial(AutoencoderKL, block_out_channels=(32, 64), **BLOCKS), "1+3+4+2"),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_branches_of_a_network_of_diffusers_are_found(name: str) -> None:
    make, expected = DIFFUSERS[name]
    assert per_stage(find_sites(build_on_meta(make))) == expected


# ---- found sites and the table

WITH_RULES = [name for name in NETWORKS if any(rule_of(module)[0] for module in build(name)[0].modules())]


def test_there_are_networks_with_every_rule() -> None:
    found = {rule_of(module)[1] for name in WITH_RULES for module in build(name)[0].modules() if rule_of(module)[0]}
    assert {f"{block.__module__}.{block.__qualname__}" for block in found} == set(BLOCK_RULES)


@pytest.mark.parametrize("name", WITH_RULES)
def test_running_a_network_finds_the_sites_of_the_table(name: str) -> None:
    network, (args, _) = build(name)
    sites, _ = branch_sites(*trace(network, args))
    found = [[(site.block, site.path) for site in stage] for stage in in_stages(sites, width_and_positions)]
    assert found == [[(site.block, site.path) for site in stage] for stage in sites_by_rules(network)]
