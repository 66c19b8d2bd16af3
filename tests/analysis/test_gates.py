"""Gate statistics of maps whose distribution is known, against numpy."""

import numpy as np
import pytest
import torch

from dia_lightning.analysis import MapRecorder, StageGates, gate_statistics
from dia_lightning.attention import attach
from dia_lightning.models import get_model
from tests.analysis.scripted_maps import Maps, recorded


def of(maps: Maps) -> StageGates:
    (stage,) = gate_statistics(recorded([maps[: len(maps) // 3], maps[len(maps) // 3 :]], replicates=0).stages)
    return stage


def test_statistics_per_channel_are_those_of_numpy() -> None:
    maps = np.random.default_rng(0).beta(2, 5, size=(50, 3, 8))
    gates = of(maps)
    for name, expected in (
        ("mean", maps.mean(0)),
        ("deviation", maps.std(0)),
        ("lowest", maps.min(0)),
        ("highest", maps.max(0)),
    ):
        np.testing.assert_allclose(getattr(gates, name).numpy(), expected, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_the_effective_range_holds_98_percent_of_the_values(alpha: float) -> None:
    maps = np.random.default_rng(1).beta(alpha, alpha, size=(400, 2, 30))
    gates = of(maps)
    expected = np.quantile(maps, [0.01, 0.99], axis=(0, 2))
    np.testing.assert_allclose(gates.low.numpy(), expected[0], atol=1 / 200)
    np.testing.assert_allclose(gates.high.numpy(), expected[1], atol=1 / 200)


def test_saturated_values_are_counted_on_both_sides() -> None:
    maps = np.full((100, 2, 10), 0.5)
    maps[:7, 0] = 0.0099
    maps[7:10, 0] = 0.9901
    maps[:50, 1, :5] = 0.0101  # not saturated
    gates = of(maps)
    assert gates.closed.tolist() == pytest.approx([0.07, 0])
    assert gates.open.tolist() == pytest.approx([0.03, 0])


def test_maps_that_never_vary_have_no_deviation_and_no_range() -> None:
    gates = of(np.full((30, 2, 4), 0.3))
    assert gates.deviation.count_nonzero() == 0
    np.testing.assert_allclose(torch.stack([gates.low, gates.high]).numpy(), 0.3, atol=1e-12)


def test_values_are_counted_relative_to_the_bound_of_an_identity_start() -> None:
    network = attach(get_model("cifar_resnet", depth=20, block="basic"), "dia-lstm", identity=True).eval()
    with MapRecorder(network) as recorder, torch.no_grad():
        network(torch.randn(2, 3, 8, 8))
    for stage in gate_statistics(recorder.stages):
        assert stage.bound == 4
        assert stage.mean.tolist() == torch.ones(3, stage.mean.shape[1]).tolist()
        assert stage.low.tolist() == stage.high.tolist() == [1, 1, 1]
        assert stage.closed.tolist() == stage.open.tolist() == [0, 0, 0]


def test_values_outside_of_the_bound_count_at_its_ends() -> None:
    maps = np.full((20, 1, 4), 0.5)
    maps[:2] = -3.0
    maps[2:5] = 7.0
    gates = of(maps)
    assert (gates.closed.item(), gates.open.item()) == pytest.approx((0.1, 0.15))
    assert (gates.lowest.min().item(), gates.highest.max().item()) == (-3, 7)
