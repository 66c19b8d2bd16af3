"""How gradients come back through the blocks of a network, and how much each block changes its input."""

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
        mean: over images, ``[T]``; NaN for blocks whose output has another shape than their input.
        deviation: standard deviation over images, ``[T]``; NaN likewise.
    """

    blocks: list[str]
    mean: Tensor
    deviation: Tensor


# Called with the path of the block, its input and its output; may return what takes the place of the output.
_Visit: TypeAlias = Callable[[str, Tensor, Tensor], Tensor | None]


def gradient_flow(
    network: nn.Module, loss: Callable[[], Tensor], *, blocks: Sequence[str] | None = None
) -> GradientFlow:
    """Return how large the gradient of a loss is at the output of each block.

    Parameters, their gradients and running statistics are left as they are. Frozen networks have gradients too.

    Args:
        network: in evaluation mode.
        loss: runs the network and returns a number. Take a sum over the images rather than a mean, so that the gradient
            of an image does not depend on the size of the batch.
        blocks: paths of modules; by default the blocks with attention. For a plain network name them.

    Raises:
        ValueError: if a module is in training mode, a block is not there or did not run, or the loss does not depend on
            it.

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
        # where everything up to here is frozen, the graph begins here; a leaf could not be changed in place
        output = after if after.requires_grad else after.detach().requires_grad_().clone()
        edges[path] = get_gradient_edge(output)  # stays with this value where later code changes it in place
        return output

    with torch.enable_grad():
        value = _run(network, loss, blocks, visit)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError("loss must return one number that gradients can be taken of. Sum it over the images.")
        gradients = torch.autograd.grad(value, list(edges.values()), allow_unused=True)
    sizes = []
    for path, gradient in zip(edges, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"The loss does not depend on the output of the block {path}. Leave it out of blocks.")
        sizes.append(gradient.detach().abs().double().cpu())
    mean = torch.stack([size.mean() for size in sizes])
    return GradientFlow(list(edges), mean, torch.stack([_quantiles(size.flatten()) for size in sizes], 1))


def relative_change(
    network: nn.Module, run: Callable[[], object], *, blocks: Sequence[str] | None = None
) -> RelativeChange:
    """Return how much each block changes its input, relative to the size of the input.

    Args:
        network: in evaluation mode.
        run: runs the network on some images; what it returns is not used.
        blocks: paths of modules; by default the blocks with attention. For a plain network name them.

    Raises:
        ValueError: if a module is in training mode, or a block is not there or did not run.

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
        _run(network, run, blocks, visit)
    of_blocks = torch.stack(list(changes.values()))  # [T, B]
    return RelativeChange(list(changes), of_blocks.mean(1), of_blocks.std(1, correction=0))


@contextmanager
def without_shortcuts(network: nn.Module) -> Iterator[None]:
    """Take the shortcuts out of all blocks of a network within the context; weights stay as they are.

    Args:
        network: whose blocks can do without, as those of ``cifar_resnet`` and ``cifar_resnext``; it may be a part of
            something larger.

    Raises:
        ValueError: if no block has a shortcut that can be taken out.

    Example:
        >>> from dia_lightning.models import get_model
        >>> network = get_model("cifar_resnet", depth=20, block="basic", num_classes=10).eval()
        >>> with without_shortcuts(network):
        ...     network.layer1[0].has_shortcut
        False
    """
    blocks: list[Any] = [module for module in network.modules() if getattr(module, "has_shortcut", False)]
    if not blocks:
        raise ValueError("No block has a shortcut that can be taken out. Take a cifar_resnet or cifar_resnext.")
    for block in blocks:
        block.has_shortcut = False
    try:
        yield
    finally:
        for block in blocks:
            block.has_shortcut = True


def _run(network: nn.Module, run: Callable[[], Any], blocks: Sequence[str] | None, visit: _Visit) -> Any:
    """Run the network and show the input and the output of each block, in the order in which they run."""
    modules = dict(network.named_modules())
    training = [path for path, module in modules.items() if module.training]
    if training:
        where = f"The module {training[0]} of the network" if training[0] else "The network"
        raise ValueError(f"{where} is in training mode, in which running statistics would change. Call network.eval().")
    if blocks is None:
        blocks = list(dict.fromkeys(layer.block for layer in attention_layers(network)))
    for path in blocks:
        if path not in modules:
            raise ValueError(f"The network has no module {path!r}. Name modules as network.named_modules() does.")
    seen: set[str] = set()
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):  # compiled code does without hooks
        for path in blocks:
            for handle in _watch_block(modules[path], path, visit, seen):
                hooks.callback(handle.remove)
        output = run()
    missing = [path for path in blocks if path not in seen]
    if missing:
        raise ValueError(f"The block {missing[0]} did not run in the forward of the network. Leave it out of blocks.")
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
                f"The output of the block {path} is a {type(first).__name__} and no features. Leave it out of blocks."
            )
        replaced = visit(path, entered.pop(), first)
        if replaced is None:
            return None  # leaves the output as it is
        return (replaced, *rest) if isinstance(output, tuple) else replaced

    return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]


def _quantiles(values: Tensor) -> Tensor:
    """Return the quantiles of values, also of more than the 16 million that torch.quantile takes."""
    ranks = [round(share * (len(values) - 1)) for share in QUANTILES]
    return values.sort().values[ranks]
