"""Correlation between layers, against maps that are made to have a known one, and against numpy."""

import pickle
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dia_lightning.analysis import MapRecorder, gate_statistics, map_correlation, mean_correlation, mean_interval
from dia_lightning.analysis.correlation import Protocol
from dia_lightning.analysis.recorder import Content
from dia_lightning.attention import attach, attention_layers
from dia_lightning.models import get_model
from tests.analysis.scripted_maps import Block, Maps, Script, play, recorded, scripted_network

LAYERS, CHANNELS = 3, 40
KNOWN = np.array([[1.0, 0.8, -0.3], [0.8, 1.0, 0.1], [-0.3, 0.1, 1.0]])


def with_known_correlation(images: int, *, along: str) -> Maps:
    """Return maps ``[images, L, C]`` with exactly the known correlation over channels, or over all values."""
    random = np.random.default_rng(0)
    root = np.linalg.cholesky(KNOWN)

    def exact(values: Maps) -> Maps:  # [L, n]
        values = values - values.mean(1, keepdims=True)
        white = np.linalg.inv(np.linalg.cholesky(np.cov(values))) @ values
        result: Maps = root @ white
        return result

    if along == "per-image":
        maps = np.stack([exact(random.normal(size=(LAYERS, CHANNELS))) for _ in range(images)])
        return maps * random.uniform(0.5, 2, (images, LAYERS, 1)) + random.normal(size=(images, LAYERS, 1))
    values = random.normal(size=(LAYERS, CHANNELS, images))
    if along == "centred":
        values = values - values.mean(2, keepdims=True)
    maps = exact(values.reshape(LAYERS, -1)).reshape(LAYERS, CHANNELS, images)
    if along == "centred":
        maps = maps + 5 * random.normal(size=(LAYERS, CHANNELS, 1))
    correlated: Maps = maps.transpose(2, 0, 1)
    return correlated


@pytest.mark.parametrize("protocol", get_args(Protocol))
def test_a_known_correlation_comes_back(protocol: Protocol) -> None:
    maps = with_known_correlation(60, along=protocol)
    (stage,) = map_correlation(recorded([maps[:7], maps[7:30], maps[30:]]).stages, protocol)
    np.testing.assert_allclose(stage.matrix.numpy(), KNOWN, atol=1e-6)
    assert stage.mean == pytest.approx((0.8 - 0.3 + 0.1) / 3, abs=1e-6)
    assert stage.layers == ["0.end", "1.end", "2.end"]


def test_channel_offsets_raise_two_protocols_and_not_the_third() -> None:
    random = np.random.default_rng(1)
    maps = random.normal(size=(200, LAYERS, CHANNELS)) + 3 * random.normal(size=CHANNELS)  # the same in every layer
    stages = recorded([maps]).stages
    per_image, pooled, centred = (map_correlation(stages, protocol)[0].mean for protocol in get_args(Protocol))
    assert min(per_image, pooled) > 0.8
    assert abs(centred) < 0.03


@pytest.mark.parametrize("share", ["stage", "block"])
def test_maps_of_a_real_network_correlate_as_numpy_says(share: Any) -> None:
    torch.manual_seed(0)
    network = attach(get_model("cifar_resnet", depth=20, block="basic"), "dia-lstm", share=share).eval()
    images = torch.randn(20, 3, 16, 16)
    collected: list[Tensor] = []
    for _, module in network.named_modules():
        if type(module).__name__ == "DIALSTM":
            module.register_forward_hook(lambda *args: collected.append(args[2][:, :, 0, 0]))
    with torch.no_grad():
        network(images)
        with MapRecorder(network) as recorder:
            for batch in (images[:6], images[6:12], images[12:]):
                network(batch)
    collected = collected[:9]
    assert recorder.images == 20
    for number, stage in enumerate(recorder.stages):
        maps = torch.stack(collected[3 * number : 3 * number + 3], 1).double().numpy()  # [B, L, C]
        expected = {
            "per-image": np.mean([np.corrcoef(image) for image in maps], 0),
            "pooled": np.corrcoef(maps.transpose(1, 0, 2).reshape(3, -1)),
            "centred": np.corrcoef((maps - maps.mean(0)).transpose(1, 0, 2).reshape(3, -1)),
        }
        for protocol in get_args(Protocol):
            (found,) = map_correlation([stage], protocol)
            np.testing.assert_allclose(found.matrix.numpy(), expected[protocol], atol=1e-6, err_msg=protocol)


def test_outputs_are_bit_equal_with_and_without_a_recorder() -> None:
    torch.manual_seed(0)
    network = attach(get_model("cifar_resnet", depth=20, block="basic"), "dia-lstm").eval()
    images = torch.randn(4, 3, 16, 16)
    plain = network(images)
    state = torch.get_rng_state()
    with MapRecorder(network):
        assert torch.equal(network(images), plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_interval_covers_the_mean_of_many_images_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    root = np.linalg.cholesky(KNOWN)
    samples = [root @ random.normal(size=(LAYERS, CHANNELS)) for _ in range(20_000)]
    truth = float(np.mean([np.corrcoef(sample[0], sample[1])[0, 1] for sample in samples]))
    hits = 0
    for seed in range(100):
        maps = np.einsum("lm,bmc->blc", root, random.normal(size=(50, LAYERS, CHANNELS)))
        (stage,) = map_correlation(recorded([maps[:, :2].repeat([1, 2], axis=1)], seed=seed).stages)
        # layers 1 and 2 are the same: the mean of the pairs (0, 1), (0, 2) and (1, 2) = 1
        low, high = ((3 * bound - 1) / 2 for bound in stage.interval)
        hits += int(low <= truth <= high)
    assert 88 <= hits <= 100


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    random = np.random.default_rng(3)
    sizes = []
    for count in (5, 50):
        recorder = recorded([random.normal(size=(8, LAYERS, CHANNELS))] * count)
        sizes.append(len(pickle.dumps((recorder.stages, recorder._arrived, recorder._weights))))
    assert sizes[0] == sizes[1]


def test_maps_that_never_vary_are_left_out_and_counted() -> None:
    maps = with_known_correlation(30, along="per-image")
    maps[:, 2] = 0.7
    (stage,) = map_correlation(recorded([maps]).stages)
    assert stage.matrix[0, 2].isnan()
    assert stage.mean == pytest.approx(0.8, abs=1e-6)
    assert stage.undefined == pytest.approx(2 / 3)
    for protocol in get_args(Protocol):
        assert map_correlation(recorded([maps]).stages, protocol)[0].matrix[0, 2].isnan()


def test_images_that_do_not_count_are_left_out() -> None:
    maps = with_known_correlation(30, along="pooled")
    network = scripted_network(LAYERS, CHANNELS)
    with MapRecorder(network) as recorder:
        recorder.only_next(torch.arange(40) < 30)
        padded = np.concatenate([maps, 100 * np.ones((10, LAYERS, CHANNELS))])
        play(network, padded[:7])  # another number of images
        play(network, padded)
        play(network, padded)  # not asked for
        recorder.only_next(torch.zeros(5, dtype=torch.bool))  # as the last batch of a process may be
        play(network, padded[:5])
    assert recorder.images == 30
    np.testing.assert_allclose(map_correlation(recorder.stages, "pooled")[0].matrix.numpy(), KNOWN, atol=1e-6)


class RunsBackwards(nn.Module):
    """A network whose stages run in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential(Block(4), Block(4))
        self.early = nn.Sequential(Block(6), Block(6))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.late(self.early(images)[:, :4])
        return features


def test_all_stages_draw_the_same_images_in_whatever_order_they_run() -> None:
    network = attach(RunsBackwards(), "se", share="block", reduction=2, sites=["*.*.end"]).double().eval()
    with MapRecorder(network) as recorder, torch.no_grad():
        for batch in (8, 8, 3):
            network(torch.randn(batch, 6, 8, 8, dtype=torch.float64))
    assert next(layer.path for layer in attention_layers(network)) == "late.0.end"
    one, other = (stage.moments.images for stage in recorder.stages)
    assert one[0] == 19
    assert one[1:].std() > 0
    assert torch.equal(one, other)


def test_an_abandoned_forward_leaves_nothing_behind() -> None:
    maps = with_known_correlation(30, along="per-image")
    network = scripted_network(LAYERS, CHANNELS)
    with MapRecorder(network) as recorder:
        Script.maps = [torch.ones(4, CHANNELS, dtype=torch.float64)]
        with pytest.raises(IndexError):
            network(torch.ones(4, CHANNELS, 2, 2, dtype=torch.float64))
        play(network, maps)
    assert recorder.images == 30
    np.testing.assert_allclose(map_correlation(recorder.stages)[0].matrix.numpy(), KNOWN, atol=1e-6)


def test_the_mean_over_stages_counts_every_pair_once() -> None:
    torch.manual_seed(0)
    network = attach(get_model("cifar_resnet", depth=20, block="basic"), "se", share="block", plug="111|110|001").eval()
    with MapRecorder(network, replicates=0) as recorder, torch.no_grad():
        network(torch.randn(6, 3, 16, 16))
    stages = map_correlation(recorder.stages)
    first, second, third = stages
    assert mean_correlation(stages) == pytest.approx((3 * first.mean + second.mean) / 4)
    assert np.isnan(third.mean)  # a single layer
    assert all(np.isnan(bound) for bound in first.interval)  # no replicates
    assert all(np.isnan(bound) for bound in mean_interval(stages))


def test_the_interval_of_the_mean_over_stages_is_that_of_its_replicates() -> None:
    random = np.random.default_rng(4)
    recorders = [recorded([random.normal(size=(40, layers, CHANNELS))], seed=5) for layers in (3, 2, 1)]
    stages = [map_correlation(recorder.stages)[0] for recorder in recorders]
    first, second = (stage.replicates.numpy() for stage in stages[:2])
    expected = np.quantile((3 * first + second) / 4, [0.025, 0.975])
    assert mean_interval(stages) == pytest.approx(tuple(expected))
    assert mean_interval(stages)[0] < mean_correlation(stages) < mean_interval(stages)[1]


def test_maps_of_the_first_images_are_kept_if_asked_for() -> None:
    maps = np.random.default_rng(0).normal(size=(9, LAYERS, CHANNELS))
    (stage,) = recorded([maps[:2], maps[2:6], maps[6:]], keep=5).stages
    np.testing.assert_array_equal(stage.kept.numpy(), maps[:5].astype(np.float32))
    assert recorded([maps]).stages[0].kept.shape == (0, LAYERS, CHANNELS)


def test_sums_of_parts_combine_to_those_of_all_images() -> None:
    maps = np.random.default_rng(0).normal(size=(20, LAYERS, CHANNELS))
    (whole,), (mine,), (other,) = (recorded([part], replicates=0).stages for part in (maps, maps[:8], maps[8:]))
    parts = {name: getattr(other.moments, name) for name in vars(other.moments)}
    kinds: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
    names = iter(vars(mine.moments))
    mine.moments.combine(lambda own, how: kinds[how](own, parts[next(names)]))
    for name, expected in vars(whole.moments).items():
        torch.testing.assert_close(getattr(mine.moments, name), expected)


@pytest.mark.parametrize("unit", ["dsu", "se", "eca", "cbam", "sge", "srm", "spa", "stac"])
def test_every_unit_can_be_recorded(unit: str) -> None:
    torch.manual_seed(0)
    network = attach(get_model("cifar_resnet", depth=20, block="basic"), unit, share="block").eval()
    for name, parameter in network.named_parameters():
        if ".dia." in name:  # some start with maps that do not vary
            nn.init.normal_(parameter)
    with MapRecorder(network) as recorder, torch.no_grad():
        network(torch.randn(6, 3, 16, 16))
    for stage in map_correlation(recorder.stages):
        assert stage.matrix.diagonal().tolist() == pytest.approx([1.0] * 3)


def test_states_can_be_recorded_in_place_of_maps() -> None:
    network = attach(get_model("cifar_resnet", depth=20, block="basic"), "dia-lstm", cells=2).eval()
    images = torch.randn(6, 3, 16, 16)
    kept = {}
    for content in get_args(Content):
        with MapRecorder(network, keep=6, content=content) as recorder, torch.no_grad():
            network(images)
        kept[content] = [stage.kept for stage in recorder.stages]
    for maps, states in zip(kept["maps"], kept["states"], strict=True):
        channels = maps.shape[2]
        assert states.shape[2] == 4 * channels  # hidden and cell state of two cells
        torch.testing.assert_close(states[:, :, 2 * channels : 3 * channels], maps)  # the upper hidden state is the map
        assert (states[:, :, 3 * channels :].sigmoid() > maps).all()  # o * sigmoid(c), with a gate o below 1
    assert map_correlation(recorder.stages)[0].matrix.shape == (3, 3)
    with pytest.raises(ValueError, match="These are states"):
        gate_statistics(recorder.stages)


def test_a_unit_without_state_has_none_to_record() -> None:
    network = attach(get_model("cifar_resnet", depth=20, block="basic"), "se").eval()
    with (
        pytest.raises(ValueError, match=r"layer1\.0\.bn2 hands no state .* content=\"maps\""),
        MapRecorder(network, content="states"),
    ):
        network(torch.randn(2, 3, 16, 16))


def test_mistakes_raise_clear_errors() -> None:
    network = attach(get_model("cifar_resnet", depth=20, block="basic"), "se")
    with pytest.raises(ValueError, match="replicates must be 0 or more, got -1"):
        MapRecorder(network, replicates=-1)
    with pytest.raises(ValueError, match="content must be one of maps, states, got 'gates'"):
        MapRecorder(network, content="gates")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Nothing was recorded"):
        _ = MapRecorder(network).stages
    with pytest.raises(ValueError, match=r"protocol must be one of per-image, pooled, centred, got 'kendall'"):
        map_correlation([], "kendall")  # type: ignore[arg-type]
