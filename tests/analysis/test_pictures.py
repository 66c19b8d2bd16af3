"""What the pictures show, and that nothing in them overlaps, for few, many and very many layers."""

from itertools import pairwise
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dia_lightning.analysis import (
    GradientFlow,
    Protocol,
    RelativeChange,
    draw_correlation,
    draw_gates,
    draw_gradients,
    draw_importance,
    draw_relative_change,
    draw_stage_gradients,
    gate_statistics,
    map_correlation,
    map_importance,
)
from dia_lightning.analysis.recorder import RecordedStage
from tests.analysis.scripted_maps import recorded

SIZES = [(3, 3, 3), (18, 18, 18), (27, 27, 27), (50,), (3, 4, 6, 3), (2,) * 9, (1, 2)]


def stages_of(sizes: tuple[int, ...], images: int = 30) -> list[RecordedStage]:
    random = np.random.default_rng(0)
    stages = []
    for number, layers in enumerate(sizes):
        (stage,) = recorded([random.uniform(size=(images, layers, 4))], replicates=20, keep=images).stages
        names = [f"layer{number + 1}.{layer}.bn2" for layer in range(layers)]
        stages.append(RecordedStage(number, names, stage.moments, stage.bound, stage.kept))
    return stages


def assert_readable(figure: Figure) -> None:
    """All ticks and titles are inside, and neither ticks of an axis nor axes overlap."""
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    width, height = figure.bbox.size
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            boxes = [tick.get_window_extent() for tick in axis.get_ticklabels() if tick.get_text()]
            assert all(not first.overlaps(second) for first, second in pairwise(boxes))
        texts: list[Any] = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
        names = [text.get_window_extent() for text in ax.texts if text.get_position()[1] == 1.01]
        assert all(not first.overlaps(second) for first, second in pairwise(names))
    titles = [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    assert all(not first.overlaps(second) for first, second in pairwise(titles))
    if figure._suptitle is not None:  # type: ignore[attr-defined]
        top = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
        assert not any(top.overlaps(title) for title in titles)


def texts_of(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_heat_maps_can_be_read(sizes: tuple[int, ...]) -> None:
    figure = draw_correlation(map_correlation(stages_of(sizes)), "per-image")
    assert_readable(figure)
    *panels, bar = figure.axes
    assert len(panels) == len(sizes)
    assert bar.get_ylabel() == "Pearson correlation"
    for ax, layers in zip(panels, sizes, strict=True):
        assert len(texts_of(ax)) == (layers**2 if layers <= 10 else 0)


@pytest.mark.parametrize("protocol", get_args(Protocol))
def test_a_panel_shows_the_matrix_and_the_title_names_the_protocol(protocol: Protocol) -> None:
    (stage,) = map_correlation(stages_of((3,)), protocol)
    figure = draw_correlation([stage], protocol)
    assert f"protocol {protocol}" in figure.get_suptitle()
    ax = figure.axes[0]
    assert texts_of(ax) == [f"{value:.2f}".replace("-0.00", "0.00") for value in stage.matrix.flatten().tolist()]
    np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), stage.matrix.numpy())
    assert ax.get_title() == (
        f"stage 0 (layer1)\nmean {stage.mean:.2f} [{stage.interval[0]:.2f}, {stage.interval[1]:.2f}]"
    )


def test_a_cell_that_is_not_defined_is_grey_and_empty() -> None:
    maps = np.random.default_rng(0).uniform(size=(20, 3, 5))
    maps[:, 1] = 0.5
    ax = draw_correlation(map_correlation(recorded([maps]).stages), "per-image").axes[0]
    assert len(texts_of(ax)) == 4
    assert cast(Any, ax.images[0].get_array()).mask.sum() == 5


def test_rows_of_importance_are_targets_and_columns_sources() -> None:
    (stage,) = map_importance(stages_of((4,)))
    ax = draw_importance([stage]).axes[0]
    assert texts_of(ax) == [f"{stage.matrix[row, column]:.2f}" for row in (1, 2, 3) for column in range(row)]
    assert ax.texts[0].get_position() == (0, 1)  # target 1, source 0
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("source layer", "target layer")


@pytest.mark.parametrize("sizes", [(3, 3, 3), (12, 2), (1, 2)], ids=str)
def test_importance_can_be_read(sizes: tuple[int, ...]) -> None:
    figure = draw_importance(map_importance(stages_of(sizes)))
    assert_readable(figure)
    assert len(figure.axes) == 1 + sum(size > 1 for size in sizes)


def test_importance_needs_more_than_one_layer() -> None:
    with pytest.raises(ValueError, match="No stage has more than one layer"):
        draw_importance(map_importance(stages_of((1, 1))))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_curves_can_be_read(sizes: tuple[int, ...]) -> None:
    gates = gate_statistics(stages_of(sizes))
    blocks = [layer.removesuffix(".bn2") for stage in gates for layer in stage.layers]
    values = np.linspace(1, 2, len(blocks))
    assert_readable(draw_gates(gates))
    assert_readable(draw_gradients(flow_of(blocks, values)))
    assert_readable(draw_gradients(flow_of(blocks, values), flow_of(blocks, 1e-9 * values)))
    assert_readable(draw_relative_change(change_of(blocks, values)))


def flow_of(blocks: list[str], values: Any) -> GradientFlow:
    mean = torch.as_tensor(values)
    return GradientFlow(blocks, mean, torch.as_tensor(np.stack([values * 0.1, values, values * 3])))


def change_of(blocks: list[str], values: Any) -> RelativeChange:
    return RelativeChange(blocks, torch.as_tensor(values), torch.as_tensor(0.1 * values))


def test_gates_show_mean_range_and_saturation_layer_by_layer() -> None:
    gates = gate_statistics(stages_of((2, 3)))
    values, shares = draw_gates(gates).axes
    np.testing.assert_allclose(
        np.asarray(values.lines[0].get_ydata()), np.concatenate([stage.mean.mean(1).numpy() for stage in gates])
    )
    np.testing.assert_allclose(
        np.asarray(shares.lines[0].get_ydata()), np.concatenate([stage.closed.numpy() for stage in gates])
    )
    assert texts_of(values) == ["stage 0", "stage 1"]


def test_gradients_that_are_0_keep_the_scale() -> None:
    values = np.array([1e-3, 0.0, 1e-4])
    ax = draw_gradients(flow_of(["a.0", "a.1", "b.0"], values)).axes[0]
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] > 1e-10
    assert texts_of(ax) == ["a", "b"]


def test_blocks_without_a_change_leave_a_gap() -> None:
    ax = draw_relative_change(change_of(["a.0", "a.1", "a.2"], np.array([0.5, np.nan, 0.2]))).axes[0]
    assert np.isnan(np.asarray(ax.lines[0].get_ydata())).tolist() == [False, True, False]


def test_gradients_with_and_without_shortcuts_are_two_named_curves() -> None:
    values = np.array([1e-3, 2e-3, 1e-4])
    ax = draw_gradients(flow_of(["a.0", "a.1", "b.0"], values), flow_of(["a.0", "a.1", "b.0"], values**3)).axes[0]
    first, second = ax.lines[:2]
    np.testing.assert_allclose(np.asarray(first.get_ydata()), values)
    np.testing.assert_allclose(np.asarray(second.get_ydata()), values**3)
    assert [first.get_label(), second.get_label()] == ["with shortcuts", "without shortcuts"]
    assert ax.get_ylim()[0] < 1e-12


@pytest.mark.parametrize("stages", [1, 3, 9])
def test_stage_gradients_can_be_read(stages: int) -> None:
    random = np.random.default_rng(0)
    values = {f"stage {n} (backbone.layer{n}.17)": random.lognormal(-9 * n, 1, 200).tolist() for n in range(stages)}
    figure = draw_stage_gradients(values)
    assert_readable(figure)
    for ax, name in zip(figure.axes, values, strict=True):
        assert ax.get_title(loc="left") == f"{name}, 200 steps"
        assert sum(bar.get_height() for bar in cast(Any, ax.patches)) == 200


def test_stage_gradients_leave_out_what_has_no_logarithm() -> None:
    figure = draw_stage_gradients({"a": [1.0, float("nan"), 0.0, float("inf"), 2.0], "b": [float("nan")]})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["a, 2 steps", "b, 0 steps"]


def test_long_names_of_a_u_net_are_shortened_and_do_not_overlap() -> None:
    blocks = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1"]
    blocks += [f"up_blocks.{number}.resnets.{part}" for number in (0, 1) for part in (0, 1)]
    flow = flow_of(blocks, np.linspace(1, 2, len(blocks)))
    figure = draw_gradients(flow)
    assert_readable(figure)
    assert_readable(draw_gradients(flow, flow))  # a longer legend
    assert texts_of(figure.axes[0]) == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    names = [f"a_very_long_name_of_a_container_{number}.0" for number in range(12)]
    assert texts_of(draw_gradients(flow_of(names, np.linspace(1, 2, 12))).axes[0]) == []
