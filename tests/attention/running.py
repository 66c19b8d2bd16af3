"""Ways to run a small network, and its expected gradients."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .networks import (
    TinyNet,
    Weights,
    backward,
    gradients,
    largest_difference,
    threaded,
    threaded_gradients,
    unit_weights,
)

Pair = tuple[TinyNet, TinyNet]


def expected_gradients(networks: Pair, *batches: Tensor) -> Weights:
    """Gradients of the sum of squared logits of all batches, by hand."""
    plain, attached = networks
    units = unit_weights(attached)
    return threaded_gradients(plain, units, *(threaded(plain, units, batch).square().sum() for batch in batches))


def staged(model: TinyNet, batch: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Run a network stage by stage."""
    features = model.stem(batch)
    for stage in (model.stage1, model.stage2, model.stage3):
        features = run(stage, features)
    logits: Tensor = model.head(features.mean((2, 3)))
    return logits


def by_block(model: TinyNet, batch: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Run a network block by block."""

    def run_blocks(stage: nn.Module, features: Tensor) -> Tensor:
        for block in stage.children():
            features = run(block, features)
        return features

    return staged(model, batch, run_blocks)


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(module: nn.Module, features: Tensor) -> Tensor:
        output: Tensor = checkpoint(module, features, use_reentrant=reentrant)
        return output

    return run


def directly(module: nn.Module, features: Tensor) -> Tensor:
    output: Tensor = module(features)
    return output


def assert_gradients(networks: Pair, loss: Tensor, *batches: Tensor) -> None:
    backward(loss)
    assert largest_difference(gradients(networks[1]), expected_gradients(networks, *batches)) <= 1e-12
