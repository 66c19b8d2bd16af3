"""Which layers could share a unit, for correlations that are given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dia_lightning.analysis import MapRecorder, StageCorrelation, map_correlation, recommend
from dia_lightning.attention import attach, attention_layers, detach
from dia_lightning.models import get_model

NAN = float("nan")


def network() -> nn.Module:
    torch.manual_seed(0)
    return attach(get_model("cifar_resnet", depth=26, block="basic", num_classes=10), "se", share="block").eval()


def correlations(*matrices: Tensor) -> list[StageCorrelation]:
    """Correlations of a network with four layers per stage."""
    return [
        StageCorrelation(
            stage, [f"layer{stage + 1}.{i}.bn2" for i in range(4)], matrix, 0.0, (NAN, NAN), 0.0, torch.zeros(0)
        )
        for stage, matrix in enumerate(matrices)
    ]


def blocks(*groups: int) -> Tensor:
    """Return a matrix that is 0.9 within groups of these sizes and 0.1 elsewhere."""
    member = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    return torch.where(member[:, None] == member, 0.9, 0.1).fill_diagonal_(1)


def test_consecutive_layers_that_agree_form_groups() -> None:
    found = recommend(network(), correlations(blocks(4), blocks(1, 2, 1), blocks(1, 3)))
    assert found.groups == [[[0, 1, 2, 3]], [[0], [1, 2], [3]], [[0], [1, 2, 3]]]
    assert found.plug == "1111|0110|0111"


def test_the_first_of_the_largest_groups_is_plugged_and_single_layers_are_not() -> None:
    assert (
        recommend(network(), correlations(blocks(2, 2), blocks(1, 1, 1, 1), blocks(1, 1, 2))).plug == "1100|0000|0011"
    )
    assert recommend(network(), correlations(*[blocks(1, 1, 1, 1)] * 3)).plug is None


def test_all_pairs_of_a_group_agree_not_only_neighbours() -> None:
    drifting = torch.tensor(0.9) ** (torch.arange(4)[:, None] - torch.arange(4)).abs()
    assert recommend(network(), correlations(*[drifting] * 3), threshold=0.8).groups[0] == [[0, 1, 2], [3]]
    assert recommend(network(), correlations(*[drifting] * 3), threshold=0.85).groups[0] == [[0, 1], [2, 3]]


def test_a_correlation_that_is_not_defined_does_not_agree() -> None:
    matrix = blocks(4)
    matrix[2] = matrix[:, 2] = NAN
    assert recommend(network(), correlations(matrix, blocks(4), blocks(4))).groups[0] == [[0, 1], [2], [3]]


def test_attach_takes_the_recommendation() -> None:
    recorded = network()
    found = recommend(recorded, correlations(blocks(1, 3), blocks(4), blocks(2, 2)))
    attach(detach(recorded), "dia-lstm", share="stage", plug=found.plug)
    paths = [layer.path.removesuffix(".bn2") for layer in attention_layers(recorded)]
    assert paths == [f"layer{stage}.{i}" for stage, which in ((1, "123"), (2, "0123"), (3, "01")) for i in which]


def test_a_block_with_several_sites_is_plugged_as_a_whole() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=3, embed_dim=24, img_size=32)
    attach(vit, "se", share="block").eval()
    with MapRecorder(vit, replicates=0) as recorder, torch.no_grad():
        vit(torch.randn(2, 3, 32, 32))
    (stage,) = map_correlation(recorder.stages)
    assert len(stage.layers) == 6  # attention and mlp of three blocks
    agreeing = StageCorrelation(0, stage.layers, blocks(1, 5), 0.0, (NAN, NAN), 0.0, torch.zeros(0))
    found = recommend(vit, [agreeing])
    assert found.plug == "011"  # of the first block only one site agrees
    assert recommend(vit, [replace(agreeing, matrix=blocks(1, 2, 2, 1))]).plug is None  # halves of two blocks each
    assert recommend(vit, [replace(agreeing, matrix=blocks(1, 3, 2))]).plug == "010"  # the smaller group fills one too
    attach(detach(vit), "se", plug=found.plug)


def test_mistakes_raise_clear_errors() -> None:
    given = correlations(blocks(4), blocks(4), blocks(4))
    for threshold in (0, 1.5, np.nan):
        with pytest.raises(ValueError, match="threshold must be above 0 and at most 1, got"):
            recommend(network(), given, threshold=threshold)
    with pytest.raises(ValueError, match="not those of this network"):
        recommend(network(), given[:2])
