"""How many kernels a function launches, and into how many graphs it compiles."""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arms import attached
from dia_lightning.models.cifar_resnet import BasicBlock

#: Operations, besides views, that compute nothing.
_NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided"}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in _NO_KERNEL:
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_kernels(run: Callable[[], object], device: torch.device) -> int:
    """Return how many kernels a run launches.

    On a GPU, those that the profiler sees, without copies. On a CPU, ATen operations that compute something and are not
    views; each would be at least one kernel on a GPU.
    """
    if device.type != "cuda":
        with _Operations() as operations:
            run()
        counted: int = operations.count
        return counted
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        run()
        torch.cuda.synchronize(device)
    on_gpu = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
    return len([1 for event in on_gpu if not _is_no_kernel(event)])


def _is_no_kernel(event: Any) -> bool:
    """Tell kernels from copies and from the labels that compiled code gives to time ranges."""
    return bool(event.is_user_annotation) or event.name.startswith(("Memcpy", "Memset"))


def count_graphs(blocks: int) -> dict[str, int]:
    """Return, by arm, how many graphs result from ``block.compile()`` on each of several equal blocks."""
    arms = attached(lambda: nn.Sequential(*[BasicBlock(8, 8) for _ in range(blocks)]).eval())
    return {arm: _graphs(build()) for arm, build in arms.items()}


def _graphs(network: nn.Module) -> int:
    count = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    for block in network.children():
        block.compile(backend=backend, fullgraph=True)
    features = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            network(features)
    torch._dynamo.reset()
    return count
