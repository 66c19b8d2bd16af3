"""Compilers and exporters: an attached network computes the same with them."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from dia_lightning.attention import attach, detach

from .networks import (
    TinyNet,
    backward,
    exact_or_refused,
    gradients,
    images,
    largest_difference,
    outstanding,
    pair,
    total,
)
from .running import Pair


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.fixture
def tiny() -> Pair:
    """A smaller network than elsewhere, because compiling is slow."""
    return pair(TinyNet(blocks=(3, 1), widths=(8, 12)).double().eval())


def compiled(model: Any, backend: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend=backend, **options)


def eager_gradients(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    for batch in batches:
        model(batch).square().sum().backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("dia-lstm", "aot_eager"),
        *((name, "eager") for name in ("dsu", "se", "eca", "cbam", "sge", "srm", "spa", "stac")),
    ],
)
def test_the_whole_network_compiles_without_a_break(name: str, backend: str) -> None:
    _, attached = pair(TinyNet(blocks=(3, 1), widths=(8, 12)).double().eval(), name)
    output = compiled(attached, backend, fullgraph=True)(images())
    torch.testing.assert_close(output, attached(images()), rtol=0, atol=1e-12)
    assert outstanding() == 0


def test_gradients_of_a_compiled_network_are_exact(tiny: Pair) -> None:
    expected = eager_gradients(tiny[1].train(), images(4))
    model = copy.deepcopy(tiny[1])
    compiled(model, "aot_eager", fullgraph=True)(images(4)).square().sum().backward()
    assert largest_difference(gradients(model), expected) <= 1e-10


def test_a_network_compiled_after_a_plain_one_keeps_its_attention(tiny: Pair) -> None:
    plain, attached = tiny
    expected = attached(images())
    assert (expected - plain(images())).abs().max() > 1e-2
    assert torch.equal(compiled(plain)(images()), plain(images()))
    assert torch.equal(compiled(attached)(images()), expected)
    assert torch.equal(compiled(plain)(images()), plain(images()))


def test_a_compiled_network_notices_that_attention_is_attached_and_detached(tiny: Pair) -> None:
    plain, attached = tiny
    model = copy.deepcopy(plain)
    run = compiled(model)
    assert torch.equal(run(images()), plain(images()))
    attach(model, "dia-lstm").load_state_dict(attached.state_dict())
    assert torch.equal(run(images()), attached(images()))
    detach(model)
    assert torch.equal(run(images()), plain(images()))


def test_two_networks_with_attention_compiled_in_turn_use_their_own_units(tiny: Pair) -> None:
    other = copy.deepcopy(tiny[1])
    with torch.no_grad():
        other.stage1[0].dia.input_expand.weight.zero_()
    for model in (tiny[1], other, tiny[1]):
        assert torch.equal(compiled(model)(images()), model(images()))


def test_one_graph_serves_every_batch_size(tiny: Pair) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(tiny[1], backend=count, dynamic=True, fullgraph=True)
    for batch in (2, 3, 7):
        torch.testing.assert_close(run(images(batch)), tiny[1](images(batch)), rtol=0, atol=1e-12)
    assert len(graphs) == 1


def test_forwards_in_eager_mode_between_compiled_ones_change_nothing(tiny: Pair) -> None:
    attached = tiny[1]
    expected = attached(images())
    run = compiled(attached)
    for _ in range(3):
        assert torch.equal(run(images()), expected)
        attached(images(3, seed=1))
        attached.stage1[0](attached.stem(images(seed=2)))  # abandoned in mid-stage
    assert torch.equal(run(images()), expected)


@pytest.mark.parametrize("how", ["block.compile()", "torch.compile(block)"])
@pytest.mark.parametrize("name", ["dia-lstm", "se", "srm"])
def test_equal_blocks_compiled_one_by_one_share_graphs(name: str, how: str) -> None:
    network: Any = nn.Sequential(*(BasicBlock(8, 8) for _ in range(12))).eval()
    attach(network, name)
    features, graphs = torch.randn(2, 8, 6, 6), []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = network(features)
        for index, block in enumerate(network):
            if how == "block.compile()":
                block.compile(backend=count, fullgraph=True)
            else:
                network[index] = torch.compile(block, backend=count, fullgraph=True)
        for _ in range(3):
            assert torch.equal(network(features), expected)
    assert len(graphs) <= 3  # the first, those in the middle, the last
    assert outstanding() == 0


def test_gradients_through_single_compiled_blocks_are_exact(tiny: Pair) -> None:
    batches = [images(seed=seed) for seed in range(2)]
    expected = eager_gradients(tiny[1], *batches)
    attached = copy.deepcopy(tiny[1])
    for block in attached.stage1:
        block.compile(backend="aot_eager")
    backward(total(attached(batch).square().sum() for batch in batches))
    assert largest_difference(gradients(attached), expected) <= 1e-10


def by_checkpointed_block(model: TinyNet, batch: Tensor) -> Tensor:
    features = model.stem(batch)
    for stage in (model.stage1, model.stage2):
        for block in stage:
            features = checkpoint(block, features, use_reentrant=False)
    logits: Tensor = model.head(features.mean((2, 3)))
    return logits


def test_compiling_over_checkpointed_blocks_is_exact_with_two_forwards(tiny: Pair) -> None:
    batches = [images(seed=seed) for seed in range(2)]
    expected = eager_gradients(tiny[1], *batches)
    model = copy.deepcopy(tiny[1])
    run = compiled(lambda batch: by_checkpointed_block(model, batch), "aot_eager")
    backward(total(run(batch).square().sum() for batch in batches))
    assert largest_difference(gradients(model), expected) <= 1e-10


def test_checkpointing_over_compiled_blocks_is_exact_or_refused(tiny: Pair) -> None:
    expected = eager_gradients(tiny[1], images())
    model = copy.deepcopy(tiny[1])
    for block in model.stage1:
        block.compile(backend="aot_eager")
    loss = by_checkpointed_block(model, images()).square().sum()
    with exact_or_refused("shared attention"):
        backward(loss)
        assert largest_difference(gradients(model), expected) <= 1e-10


def test_a_compiled_forward_that_stops_in_mid_stage_can_be_repeated(tiny: Pair) -> None:
    attached = tiny[1]
    run = compiled(lambda batch: attached.stage1[1](attached.stage1[0](attached.stem(batch))), fullgraph=True)
    expected = attached.stage1[1](attached.stage1[0](attached.stem(images())))
    for _ in range(12):
        assert torch.equal(run(images()), expected)
    assert outstanding() <= 1


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "single blocks"])
def test_two_streams_through_compiled_blocks_in_turn_are_exact(tiny: Pair, whole: bool) -> None:
    attached = tiny[1]

    def run(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        u, v = attached.stem(u), attached.stem(v)
        for block in attached.stage1:
            u, v = block(u), block(v)
        return u, v

    expected = run(images(seed=1), images(seed=2))
    if not whole:
        for block in attached.stage1:
            block.compile(backend="eager")
    outputs = (compiled(run) if whole else run)(images(seed=1), images(seed=2))
    assert all(torch.equal(output, target) for output, target in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_takes_every_batch_size(tiny: Pair, strict: bool) -> None:
    program = export(tiny[1], (images(),), dynamic_shapes={"images": {0: Dim("batch")}}, strict=strict)
    for batch in (2, 5):
        torch.testing.assert_close(program.module()(images(batch)), tiny[1](images(batch)), rtol=0, atol=1e-12)
    assert outstanding() == 0
    assert torch.equal(tiny[1](images()), tiny[1](images()))


@pytest.mark.slow
def test_inductor_gives_the_same_outputs_and_gradients() -> None:
    _, attached = pair(TinyNet(blocks=(2,), widths=(4,)).eval())
    batch = images(dtype=torch.float32)
    expected, expected_gradients = attached(batch), eager_gradients(attached, batch)
    model = copy.deepcopy(attached)
    output = torch.compile(model, fullgraph=True)(batch)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    output.square().sum().backward()
    scale = max(value.abs().max().item() for value in expected_gradients.values())
    assert largest_difference(gradients(model), expected_gradients) <= 1e-4 * scale
