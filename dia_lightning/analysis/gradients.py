"""How gradients flow back through the blocks of a network, and how much each block changes its input."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
        mean: over images, ``[T]``; NaN for blocks whose output differs in shape from their input.
        deviation: standard deviation over images, ``[T]``; NaN for the same blocks.
    """

    blocks: list[str]
    mean: Tensor
    deviation: Tensor


# Called with the path of the block, its input and its output; may return a replacement for the output.
_Visit: TypeAlias = Callable[[str, Tensor, Tensor], Tensor | None]


def gradient_flow(
    network: nn.Module, loss: Callable[[], Tensor], *, blocks: Sequence[str] | None = None
) -> GradientFlow:
    """Return the size of the gradient of a loss at the output of each block.

    Parameters, their gradients and running statistics do not change. Works for frozen networks too.

    Args:
        network: in evaluation mode.
        loss: runs the network and returns a scalar. Sum over the images rather than averaging, so that the gradient of
            an image does not depend on the batch size.
        blocks: paths of modules; by default the blocks with attention. Required for a plain network.

    Raises:
        ValueError: if a module is in training mode, a block does not exist or did not run, or the loss does not depend
            on it.

    Example:
        >>> from dia_lightning.models import get_model
        >>> network = get_model("cifar_resnet", depth=20, block="basic", num_classes=10).eval()
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> flow = gradient_flow(network, lambda: network(images).sum(), blocks=["layer1.0", "layer3.2"])
        >>> flow.mean.shape
        torch.Size([2])
    """
    edges: dict[str, Any] = {}

    def visit(path: str, before: Tensor, after: Tensor) -> Tensor | None:
        # if everything up to here is frozen, the graph begins here; a leaf could not be changed in place
        output = after if after.requires_grad else after.detach().requires_grad_().clone()
        edges[path] = get_gradient_edge(output)  # keeps to this value even if later code changes it in place
        return output

    with torch.enable_grad():
        value = _run(network, loss, blocks, visit)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError("loss must return a scalar that requires grad. Sum it over the images.")
        gradients = torch.autograd.grad(value, list(edges.values()), allow_unused=True)
    sizes = []
    for path, gradient in zip(edges, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"The loss does not depend on the output of the block {path}. Remove it from blocks.")
        sizes.append(gradient.detach().abs().double().cpu())
    mean = torch.stack([size.mean() for size in sizes])
    return GradientFlow(list(edges), mean, torch.stack([_quantiles(size.flatten()) for size in sizes], 1))


def relative_change(
    network: nn.Module, run: Callable[[], object], *, blocks: Sequence[str] | None = None
) -> RelativeChange:
    """Return how much each block changes its input, relative to the size of the input.

    Args:
        network: in evaluation mode.
        run: runs the network on some images; its return value is ignored.
        blocks: paths of modules; by default the blocks with attention. Required for a plain network.

    Raises:
        ValueError: if a module is in training mode, or a block does not exist or did not run.

    Source:
        An interpretation of the stiffness of arXiv 2308.09939, whose text was not available: the relative change of the
        features from block to block.
    """
    changes: dict[str, Tensor] = {}

    def visit(path: str, before: Tensor, after: Tensor) -> None:
        changes[path] = torch.full((len(after),), torch.nan, dtype=torch.float64)
        if before.shape == after.shape:
            start = before.double().flatten(1)
            change = (after.double().flatten(1) - start).norm(dim=1) / start.norm(dim=1)
            changes[path] = change.cpu()

    with torch.no_grad():
        _run(network, run, blocks, visit)
    of_blocks = torch.stack(list(changes.values()))  # [T, B]
    return RelativeChange(list(changes), of_blocks.mean(1), of_blocks.std(1, correction=0))


@contextmanager
def without_shortcuts(network: nn.Module) -> Iterator[None]:
    """Disable the shortcuts of all blocks of a network within the context; weights do not change.

    Args:
        network: one whose blocks can run without, such as ``cifar_resnet`` and ``cifar_resnext``; it may be part of a
            larger module.

    Raises:
        ValueError: if no block has a shortcut that can be disabled.

    Example:
        >>> from dia_lightning.models import get_model
        >>> network = get_model("cifar_resnet", depth=20, block="basic", num_classes=10).eval()
        >>> with without_shortcuts(network):
        ...     network.layer1[0].has_shortcut
        False
    """
    blocks: list[Any] = [module for module in network.modules() if getattr(module, "has_shortcut", False)]
    if not blocks:
        raise ValueError("No block has a shortcut that can be disabled. Use a cifar_resnet or cifar_resnext.")
    for block in blocks:
        block.has_shortcut = False
    try:
        yield
    finally:
        for block in blocks:
            block.has_shortcut = True


def _run(network: nn.Module, run: Callable[[], Any], blocks: Sequence[str] | None, visit: _Visit) -> Any:
    """Run the network and pass the input and output of each block to a callback, in the order in which they run."""
    modules = dict(network.named_modules())
    training = [path for path, module in modules.items() if module.training]
    if training:
        where = f"The module {training[0]} of the network" if training[0] else "The network"
        raise ValueError(f"{where} is in training mode, which would change running statistics. Call network.eval().")
    if blocks is None:
        blocks = list(dict.fromkeys(layer.block for layer in attention_layers(network)))
    for path in blocks:
        if path not in modules:
            raise ValueError(f"The network has no module {path!r}. Use a name from network.named_modules().")
    seen: set[str] = set()
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):  # compiled code skips hooks
        for path in blocks:
            for handle in _watch_block(modules[path], path, visit, seen):
                hooks.callback(handle.remove)
        output = run()
    missing = [path for path in blocks if path not in seen]
    if missing:
        raise ValueError(f"The block {missing[0]} did not run in the network's forward. Remove it from blocks.")
    return output


def _watch_block(block: nn.Module, path: str, visit: _Visit, seen: set[str]) -> list[Any]:
    entered: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        entered[:] = [features.detach().clone()]  # the block may change it in place

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        seen.add(path)
        first, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor):
            raise ValueError(
                f"The output of the block {path} is a {type(first).__name__}, not features. Remove it from blocks."
            )
        replaced = visit(path, entered.pop(), first)
        if replaced is None:
            return None  # keeps the output
        return (replaced, *rest) if isinstance(output, tuple) else replaced

    return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]


def _quantiles(values: Tensor) -> Tensor:
    """Return quantiles, even of more than the 16 million values that torch.quantile takes."""
    ranks = [round(share * (len(values) - 1)) for share in QUANTILES]
    return values.sort().values[ranks]
