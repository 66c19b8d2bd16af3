"""How gradients come back through the blocks of a network, and how much each block changes its input."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dia_lightning.attention import attention_layers

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class GradientFlow:
    """Size of the gradient of the loss at the output of each block, ``|dLoss / d output|``.

    Args:
        blocks: paths of the blocks, in the order in which they ran.
        mean: over images, channels and positions, ``[T]``.
        quantiles: 5 %, 50 % and 95 % of the same, ``[3, T]``.
    """

    blocks: list[str]
    mean: Tensor
    quantiles: Tensor


@dataclass(frozen=True)
class RelativeChange:
    """How much the blocks change their input, :math:`\\lVert x_{t+1} - x_t \\rVert / \\lVert x_t \\rVert`.

    Args:
        blocks: paths of the blocks, in the order in which they ran.
        mean: over images, ``[T]``; NaN for blocks whose output has another shape than their input.
        deviation: standard deviation over images, ``[T]``; NaN likewise.
    """

    blocks: list[str]
    mean: Tensor
    deviation: Tensor


_Visit: TypeAlias = Callable[[str, Tensor, Tensor], None]  # path of the block, its input, its output


def gradient_flow(
    network: nn.Module,
    images: Tensor,
    loss: Callable[[Any], Tensor],
    *,
    blocks: Sequence[str] | None = None,
) -> GradientFlow:
    """Return how large the gradient of a loss is at the output of each block.

    Parameters, their gradients and running statistics are left as they are.

    Args:
        network: in evaluation mode.
        images: ``[B, C, H, W]``.
        loss: maps the output of the network to a number. Take a sum over the images rather than a mean, so that the
            gradient of an image does not depend on the size of the batch.
        blocks: paths of modules; by default the blocks with attention. For a plain network name them.

    Raises:
        ValueError: if the network is in training mode, or a block is not there or did not run.

    Example:
        >>> from dia_lightning.models import get_model
        >>> network = get_model("cifar_resnet", depth=20, block="basic", num_classes=10).eval()
        >>> flow = gradient_flow(network, torch.zeros(2, 3, 32, 32), torch.sum, blocks=["layer1.0", "layer3.2"])
        >>> flow.mean.shape
        torch.Size([2])
    """
    edges: dict[str, Any] = {}

    def visit(path: str, before: Tensor, after: Tensor) -> None:
        edges[path] = get_gradient_edge(after)  # stays with this value where later code changes it in place

    images = images.detach().requires_grad_()  # so that frozen networks have gradients too
    with torch.enable_grad():
        output = _run(network, images, blocks, visit)
        gradients = torch.autograd.grad(loss(output), list(edges.values()))
    sizes = [gradient.detach().abs().double().cpu() for gradient in gradients]
    mean = torch.stack([size.mean() for size in sizes])
    return GradientFlow(list(edges), mean, torch.stack([_quantiles(size.flatten()) for size in sizes], 1))


def relative_change(network: nn.Module, images: Tensor, *, blocks: Sequence[str] | None = None) -> RelativeChange:
    """Return how much each block changes its input, relative to the size of the input.

    Args:
        network: in evaluation mode.
        images: ``[B, C, H, W]``.
        blocks: paths of modules; by default the blocks with attention. For a plain network name them.

    Raises:
        ValueError: if the network is in training mode, or a block is not there or did not run.

    Source:
        A reading of the stiffness of arXiv 2308.09939, whose text was not at hand: the relative change of the features
        from block to block.
    """
    changes: dict[str, Tensor] = {}

    def visit(path: str, before: Tensor, after: Tensor) -> None:
        changes[path] = torch.full((len(after),), torch.nan, dtype=torch.float64)
        if before.shape == after.shape:
            start = before.double().flatten(1)
            change = (after.double().flatten(1) - start).norm(dim=1) / start.norm(dim=1)
            changes[path] = change.cpu()

    with torch.no_grad():
        _run(network, images, blocks, visit)
    of_blocks = torch.stack(list(changes.values()))  # [T, B]
    return RelativeChange(list(changes), of_blocks.mean(1), of_blocks.std(1, correction=0))


def _run(network: nn.Module, images: Tensor, blocks: Sequence[str] | None, visit: _Visit) -> Any:
    """Run the network and show the input and the output of each block, in the order in which they run."""
    if network.training:
        raise ValueError(
            "The network is in training mode, in which running statistics would change. Call network.eval()."
        )
    if blocks is None:
        blocks = list(dict.fromkeys(layer.block for layer in attention_layers(network)))
    modules = dict(network.named_modules())
    for path in blocks:
        if path not in modules:
            raise ValueError(f"The network has no module {path!r}. Name modules as network.named_modules() does.")
    seen: set[str] = set()
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):  # compiled code does without hooks
        for path in blocks:
            for handle in _watch_block(modules[path], path, visit, seen):
                hooks.callback(handle.remove)
        output = network(images)
    missing = [path for path in blocks if path not in seen]
    if missing:
        raise ValueError(f"The block {missing[0]} did not run in the forward of the network. Leave it out of blocks.")
    return output


def _watch_block(block: nn.Module, path: str, visit: _Visit, seen: set[str]) -> list[Any]:
    entered: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        entered[:] = [features.detach().clone()]  # the block may change it in place

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.add(path)
        visit(path, entered.pop(), output[0] if isinstance(output, tuple) else output)

    return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]


def _quantiles(values: Tensor) -> Tensor:
    """Return the quantiles of values, also of more than the 16 million that torch.quantile takes."""
    ranks = [round(share * (len(values) - 1)) for share in QUANTILES]
    return values.sort().values[ranks]
