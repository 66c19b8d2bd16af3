"""Small residual networks, and an independent forward of a network with DIA-LSTM that threads the state by hand."""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from dia_lightning.attention import attach
from dia_lightning.attention._running import RUNNING

Weights = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


class TinyNet(nn.Module):
    """Stages of torchvision's basic blocks; the second of the usual three has a single block."""

    stage1: Any
    stage2: Any
    stage3: Any

    def __init__(self, blocks: Sequence[int] = (3, 1, 4), widths: Sequence[int] = (8, 8, 12)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1), nn.BatchNorm2d(widths[0]), nn.ReLU())
        inputs = widths[0]
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            first = BasicBlock(inputs, width, downsample=None if inputs == width else nn.Conv2d(inputs, width, 1))
            self.add_module(
                f"stage{number}", nn.Sequential(first, *(BasicBlock(width, width) for _ in range(count - 1)))
            )
            inputs = width
        self.head = nn.Linear(inputs, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for _, stage in stages(self):
            features = stage(features)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def randomised(model: Network, seed: int = 0) -> Network:
    """Give every parameter and statistic a random value at which it matters, including those of the attention."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if leaf == "running_var":
                tensor.copy_(0.5 + noise(tensor).abs())
            elif leaf in ("num_batches_tracked", "scale"):
                continue
            elif tensor.ndim == 1:
                tensor.copy_(0.3 * noise(tensor) + (1.0 if leaf == "weight" else 0.0))
            else:
                gain = 2.5 if ".dia." in f".{name}" else 1.2
                tensor.copy_(gain * noise(tensor) / max(1, tensor[0].numel()) ** 0.5)
    return model


def pair(plain: Network, attention: str = "dia-lstm", **options: Any) -> tuple[Network, Network]:
    """Return a randomised plain network and a copy of it with randomised attention."""
    randomised(plain)
    attached = randomised(attach(copy.deepcopy(plain), attention, **options), seed=1)
    attached.load_state_dict(plain.state_dict(), strict=False)
    return plain, attached


def images(batch: int = 2, size: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit_weights(attached: nn.Module, share: str = "stage") -> dict[str, Weights]:
    """Return leaf copies of the weights of every unit, by the path of its stage, or of its block if not shared."""
    units: dict[str, Weights] = {}
    for key, value in attached.state_dict().items():
        block, found, name = key.partition(".dia.")
        if found:
            path = block.rpartition(".")[0] if share == "stage" else block
            units.setdefault(path, {})[name] = value.clone().requires_grad_()
    return units


def lstm_step(weights: Weights, features: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One step of a DIA-LSTM with a single cell."""
    value = features.mean((2, 3))
    hidden, cell = (torch.zeros_like(value),) * 2 if state is None else state
    inner = F.relu(F.linear(value, weights["input_reduce.weight"], weights["input_reduce.bias"]))
    gates = F.linear(inner, weights["input_expand.weight"], weights["input_expand.bias"])
    inner = F.relu(F.linear(hidden, weights["hidden_reduce.weight"], weights["hidden_reduce.bias"]))
    gates = gates + F.linear(inner, weights["hidden_expand.weight"], weights["hidden_expand.bias"])
    width = value.shape[1]
    i, f, g, o = (gates[:, k * width : (k + 1) * width] for k in range(4))
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.sigmoid()
    return hidden[:, :, None, None], (hidden, cell)


def branch_and_shortcut(block: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """Run a torchvision block up to the addition."""
    shortcut = features if block.downsample is None else block.downsample(features)
    branch = F.relu(block.bn1(block.conv1(features)))
    branch = block.bn2(block.conv2(branch))
    if hasattr(block, "conv3"):
        branch = block.bn3(block.conv3(F.relu(branch)))
    return branch, shortcut


def stages(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    for name, child in model.named_children():
        if name.startswith(("stage", "layer")):
            assert isinstance(child, nn.Sequential)
            yield name, child


def threaded(
    plain: Any, units: dict[str, Weights], batch: Tensor, mask: Sequence[int] | None = None, *, restart: bool = False
) -> Tensor:
    """Run a plain network and thread the state of each stage's unit by hand.

    Args:
        plain: network without attention.
        units: weights of the unit of each stage, or of each block.
        batch: images.
        mask: which blocks, in order, have attention.
        restart: forget the state at every block, to show that it matters.
    """
    plugged = iter(mask if mask is not None else [1] * 1000)
    is_resnet = isinstance(plain, ResNet)
    features = plain.maxpool(F.relu(plain.bn1(plain.conv1(batch)))) if is_resnet else plain.stem(batch)
    for name, stage in stages(plain):
        state = None
        for index, block in enumerate(stage):
            branch, shortcut = branch_and_shortcut(block, features)
            if next(plugged):
                own = units.get(f"{name}.{index}")
                weights = units[name] if own is None else own
                attention_map, state = lstm_step(weights, branch, None if restart or own is not None else state)
                branch = branch * attention_map
            features = F.relu(branch + shortcut)
    pooled = features.mean((2, 3))
    logits: Tensor = (plain.fc if is_resnet else plain.head)(pooled)
    return logits


def backward(loss: Tensor, **options: Any) -> None:
    loss.backward(**options)  # type: ignore[no-untyped-call]


def total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


@contextmanager
def exact_or_refused(message: str) -> Iterator[None]:
    """Let a clear error, or the compiler's own refusal, pass; the caller checks what is computed."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException:
        pass
    except RuntimeError as error:
        if message not in str(error):
            raise


def gradients(model: nn.Module) -> Weights:
    """Return the gradients by name, those of a unit under the path of its stage; a missing one is an error."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[re.sub(r"\.\d+\.dia\.", ".dia.", name)] = parameter.grad.clone()
    return found


def threaded_gradients(plain: nn.Module, units: dict[str, Weights], *losses: Tensor) -> Weights:
    """Run backward through hand-threaded forwards and return the gradients under the names of :func:`gradients`."""
    plain.zero_grad()
    backward(total(losses))
    found = gradients(plain)
    for name, weights in units.items():
        for key, weight in weights.items():
            assert weight.grad is not None
            found[f"{name}.dia.{key}"] = weight.grad
    return found


def largest_difference(first: Weights, second: Weights) -> float:
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def outstanding() -> int:
    """Return how many calls of blocks and of their owners are in progress in this thread."""
    frame, scope, count = RUNNING.frame, RUNNING.scope, 0
    while frame is not None:
        frame, count = frame.outer, count + 1
    while scope is not None:
        scope, count = scope.outer, count + 1
    return count


def plain_keys(model: nn.Module) -> list[str]:
    own = re.compile(r"\.(dia|branch_norm|unit_norm)\.")
    return [key for key in model.state_dict() if not own.search(key)]


def snapshot(model: nn.Module) -> tuple[list[tuple[str, type]], list[str]]:
    """Return what a network consists of: the type of every module, and its keys."""
    return [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())


def assert_equals_threaded(
    plain: nn.Module, attached: nn.Module, batch: Tensor, mask: list[int] | None = None, share: str = "stage"
) -> None:
    units = unit_weights(attached, share)
    expected = threaded(plain, units, batch, mask)
    output = attached(batch)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    output.square().sum().backward()
    if share == "stage":
        assert (
            largest_difference(gradients(attached), threaded_gradients(plain, units, expected.square().sum())) <= 1e-12
        )
