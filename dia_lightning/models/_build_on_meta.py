"""Networks that use no memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on the meta device, where tensors have shapes but no contents.

    Args:
        build: makes the network.

    Returns:
        The network, with all tensors on the meta device.

    Example:
        >>> from dia_lightning.models import build_on_meta, wrn52_4
        >>> sum(parameter.numel() for parameter in build_on_meta(wrn52_4).parameters())
        12072500
    """
    # Some builders compute sizes with tensors, which needs contents. Any other error is raised again at the end.
    for mode in (torch.device("meta"), _EmptyOnMeta()):
        try:
            with mode:
                return build().to("meta")
        except (NotImplementedError, RuntimeError):
            continue
    return build().to("meta")


class _EmptyOnMeta(TorchFunctionMode):
    """Only create tensors without contents if they start uninitialised, as weights do."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = {**(kwargs or {}), "device": "meta"} if function is torch.empty else kwargs or {}
        return function(*args, **options)
