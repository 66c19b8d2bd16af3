"""A loss and its gradients as a CUDA graph: runs at the GPU's speed, however slowly the processor launches kernels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
WARM_UP = 3  # before the capture, cuDNN selects its kernels and autograd creates its buffers


def backward(network: nn.Module, loss: Loss, images: Tensor, labels: Tensor) -> Loss:
    """Return a function that returns the loss of a batch and replaces the gradient of every parameter.

    Args:
        network: in the mode in which it will run; its weights and running statistics do not change here.
        loss: function of images and labels that does not read their values on the host.
        images: a batch; all others must have its shape. On a GPU it is used for the capture.
        labels: those of the images.
    """
    return _Captured(network, loss, images, labels) if images.is_cuda else _eager(network, loss)


def _eager(network: nn.Module, loss: Loss) -> Loss:
    def run(images: Tensor, labels: Tensor) -> Tensor:
        network.zero_grad(set_to_none=True)
        value = loss(images, labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    return run


class _Captured:
    def __init__(self, network: nn.Module, loss: Loss, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        before = [buffer.clone() for buffer in network.buffers()]
        run, side = _eager(network, loss), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run(self.images, self.labels)
        torch.cuda.current_stream().wait_stream(side)
        network.zero_grad(set_to_none=True)  # so that gradients are allocated in the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = run(self.images, self.labels)
        for buffer, value in zip(network.buffers(), before, strict=True):
            buffer.copy_(value)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss
