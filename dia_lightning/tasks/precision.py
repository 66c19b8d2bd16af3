"""What the precision of the trainer means for tasks and for callbacks."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

_HALF = (torch.float16, torch.bfloat16)


def input_dtype(trainer: Trainer) -> torch.dtype:
    """Return the type that the trainer converts all float32 tensors of a batch to, whatever they are for."""
    converted: Tensor = trainer.precision_plugin.convert_input(torch.zeros(1, dtype=torch.float32))
    return converted.dtype


def check_keeps_boxes(trainer: Trainer) -> None:
    """Refuse a precision that rounds boxes and anchors.

    Raises:
        ValueError: if it does.
    """
    dtype = input_dtype(trainer)
    if dtype in _HALF:
        raise ValueError(
            f"precision={trainer.precision!r} would round boxes and anchors, above 512 pixels to "
            f"{512 * torch.finfo(dtype).eps:g}. Detection takes 32-true, 16-mixed, bf16-mixed and 64-true "
            "(--trainer.precision bf16-mixed)."
        )


def check_gradients_survive(trainer: Trainer, optimizer: Optimizer) -> None:
    """Warn of a precision that loses small gradients, and refuse an optimizer that makes weights NaN.

    Raises:
        ValueError: if the optimizer divides by its ``eps``, and that is 0 in float16.
    """
    if trainer.precision != "16-true":
        return
    eps = optimizer.defaults.get("eps")
    if eps is not None and torch.tensor(eps, dtype=torch.float16) == 0:
        raise ValueError(
            f"{type(optimizer).__name__} divides by eps={eps:g}, which is 0 with precision='16-true', so weights "
            "become NaN. Use 16-mixed or bf16-true (--trainer.precision 16-mixed), or optimizer='sgd'."
        )
    rank_zero_warn(
        "precision='16-true' has no loss scaling: gradients below 6e-8 are lost and losses above 65504 are infinite. "
        "16-mixed scales the loss, and bf16-true has the range of float32."
    )
