"""Importance between layers of which it is known who depends on whom."""

from typing import get_args

import numpy as np
import pytest
import torch

from dia_lightning.analysis import map_importance
from dia_lightning.analysis.importance import Layout
from tests.analysis.scripted_maps import Maps, recorded

LAYERS, CHANNELS, IMAGES = 4, 3, 150


def independent(seed: int = 0) -> Maps:
    return np.random.default_rng(seed).uniform(size=(IMAGES, LAYERS, CHANNELS))


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_copy_depends_on_its_original(layout: Layout, source: int) -> None:
    maps = independent()
    maps[:, 3] = maps[:, source]
    (stage,) = map_importance(recorded([maps], keep=IMAGES).stages, layout)
    assert stage.matrix[3].argmax().item() == source
    assert stage.matrix[3, source].item() > (0.95 if layout == "values" else 0.6)
    assert stage.explained[3].item() > (0.95 if layout == "values" else 0.5)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_layers_that_have_nothing_in_common_explain_nothing(layout: Layout) -> None:
    (stage,) = map_importance(recorded([independent()], keep=IMAGES).stages, layout)
    assert stage.explained[0].isnan()
    assert (stage.explained[1:] < 0.1).all()


@pytest.mark.parametrize("layout", get_args(Layout))
def test_the_matrix_is_lower_triangular_and_its_rows_sum_to_1(layout: Layout) -> None:
    (stage,) = map_importance(recorded([independent()], keep=IMAGES).stages, layout)
    assert torch.equal(stage.matrix, stage.matrix.tril(-1))
    assert (stage.matrix >= 0).all()
    torch.testing.assert_close(stage.matrix.sum(1), torch.tensor([0.0, 1, 1, 1], dtype=torch.float64))


def test_the_seed_decides_and_rows_are_bounded() -> None:
    stages = recorded([independent()], keep=IMAGES).stages
    first, again, other, few = (
        map_importance(stages, **options)[0].matrix  # type: ignore[arg-type]
        for options in ({"rows": 100}, {"rows": 100}, {"rows": 100, "seed": 1}, {"rows": 50})
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, few)


def test_maps_that_never_vary_have_no_importance() -> None:
    maps = independent()
    maps[:, 2] = 0.25
    (stage,) = map_importance(recorded([maps], keep=IMAGES).stages)
    assert stage.matrix[2, :2].isnan().all()
    assert stage.explained[2].isnan()
    assert stage.matrix[3, 2].item() == 0  # nor can another be predicted from them


def test_a_single_layer_has_no_importance() -> None:
    (stage,) = map_importance(recorded([independent()[:, :1]], keep=IMAGES).stages)
    assert stage.matrix.tolist() == [[0]]


def test_mistakes_raise_clear_errors() -> None:
    stages = recorded([independent()], keep=IMAGES).stages
    with pytest.raises(ValueError, match="layout must be one of values, images, got 'rows'"):
        map_importance(stages, "rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trees must be 30 or more, got 5"):
        map_importance(stages, trees=5)
    with pytest.raises(ValueError, match=r"0 were kept\. Record with MapRecorder\(network, keep=1000\)"):
        map_importance(recorded([independent()]).stages)
