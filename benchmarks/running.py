"""A network and one batch of images, to be run repeatedly."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arms import Build, Workload

Mode = Literal["eager", "compile", "reduce-overhead"]
Phase = Literal["training", "inference"]


@dataclass(frozen=True)
class Setting:
    """How to run networks.

    Args:
        device: where.
        mode: eager, ``torch.compile``, or ``torch.compile(mode="reduce-overhead")``.
        bf16: whether to use bfloat16 autocast.
        channels_last: whether weights and images use that memory format.
    """

    device: torch.device
    mode: Mode = "eager"
    bf16: bool = False
    channels_last: bool = False

    @property
    def label(self) -> str:
        """Device and options, without the mode, in words."""
        parts = [self.device.type, "bf16" if self.bf16 else "float32", "channels_last" if self.channels_last else ""]
        return " ".join(filter(None, parts))


class Run:
    """A network and its batch.

    Args:
        build: builds the network.
        workload: the images.
        setting: how to run it.
    """

    def __init__(self, build: Build, workload: Workload, setting: Setting) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.setting = setting
        self.network = build().to(setting.device, memory_format=layout)  # type: ignore[call-overload]
        images = torch.randn(workload.batch, 3, workload.size, workload.size)
        self.images = images.to(setting.device, memory_format=layout)
        self.labels = torch.randint(workload.classes, (workload.batch,)).to(setting.device)
        self._call: Callable[[Tensor], Tensor] = self.network
        if setting.mode != "eager":
            # arms share the code of their classes, so each adds a graph of the same function; beyond the limit they
            # would silently run uncompiled
            torch._dynamo.config.recompile_limit = 128
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            options: dict[str, Any] = {} if setting.mode == "compile" else {"mode": setting.mode}
            self._call = torch.compile(self.network, **options)

    def prepared(self, phase: Phase) -> Callable[[], None]:
        """Switch the network to the phase, and return a function that runs it once."""
        self.network.train(phase == "training")
        return self.step if phase == "training" else self.infer

    def loss(self) -> Tensor:
        """Run the network forward."""
        if self.setting.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with self._autocast():
            return F.cross_entropy(self._call(self.images), self.labels)

    def step(self) -> None:
        """Run forward and backward, and drop the gradients; the weights do not change."""
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.network.zero_grad(set_to_none=True)

    def infer(self) -> None:
        """Run the network forward, without gradients."""
        if self.setting.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.no_grad(), self._autocast():
            self._call(self.images)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if not self.setting.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.setting.device.type, torch.bfloat16)
