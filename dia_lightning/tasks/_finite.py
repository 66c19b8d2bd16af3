"""Stops training before anything NaN or infinite is saved."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dia_lightning.tasks._optimization import TrainableModule
from dia_lightning.tasks._trainer import trainer_of

_ADVICE = "Lower lr, add warmup_epochs or trainer.gradient_clip_val, or check the data of this batch."
_STATISTICS = ("running_mean", "running_var")


class NonFiniteLossError(RuntimeError):
    """The loss, a gradient or a weight became NaN or infinite; raised before such weights are saved.

    The program exits with a dedicated code, so that scripts can tell a diverged run from a failed one.
    """

    exit_code = 3


class FiniteModule(TrainableModule):
    """A module that checks its loss, its gradients, and the weights of every checkpoint.

    Subclasses call :meth:`check_loss` in each training step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last_finite_loss: Tensor | None = None
        self._largest_gradient: Tensor | None = None  # of the last optimizer step, until it is checked
        self._place = ""  # of that step

    def check_loss(self, loss: Tensor, batch_index: int, parts: Mapping[str, Tensor] | None = None) -> None:
        """Stop before a NaN or infinite loss reaches the weights, in all processes of a distributed run.

        Args:
            loss: the loss to minimise.
            batch_index: of the batch in its epoch, for the message.
            parts: the terms of the loss, by name, so that the message can name the bad one.

        Raises:
            NonFiniteLossError: with the batch and the last finite loss.
        """
        is_finite = torch.isfinite(loss.detach())
        if self._largest_gradient is not None:  # a single device sync for both
            is_finite = is_finite & torch.isfinite(self._largest_gradient).to(is_finite.device)
        trainer = trainer_of(self)
        if trainer is not None and trainer.world_size > 1:
            # otherwise the others would wait for the one that stops
            is_finite = is_finite.int()
            torch.distributed.all_reduce(is_finite, torch.distributed.ReduceOp.MIN)
        if is_finite:
            self._last_finite_loss, self._largest_gradient = loss.detach(), None
            return
        self._check_last_gradients()
        last = "none" if self._last_finite_loss is None else f"{self._last_finite_loss.item():.4g}"
        wrong = [name for name, part in (parts or {}).items() if not torch.isfinite(part)]
        cause = f" (from {', '.join(wrong)})" if wrong else ""
        value = "not finite in another process" if torch.isfinite(loss) else f"{loss.item()}{cause}"
        raise NonFiniteLossError(
            f"The loss is {value} at batch {batch_index} of epoch {self.current_epoch}; the last finite loss was "
            f"{last}. {_ADVICE}"
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before a NaN or infinite gradient reaches the weights, or one step later on an accelerator.

        There, an immediate check would make the device wait for this process in every step.

        Raises:
            NonFiniteLossError: with the batch, unless the scaler of ``16-mixed`` skips the step and can still lower
                its scale.
        """
        gradients = [each.grad for each in self.parameters() if each.grad is not None and each.grad.numel() > 0]
        if not gradients or self._is_left_out(optimizer):
            return
        self._largest_gradient = _largest(gradients)
        self._place = f"batch {self.trainer.fit_loop.batch_idx} of epoch {self.current_epoch}"
        if self._largest_gradient.device.type == "cpu":
            self._check_last_gradients()

    def _check_last_gradients(self) -> None:
        largest = self._largest_gradient
        if largest is not None and not torch.isfinite(largest):
            wrong = _wrong_names({name: each.grad for name, each in self.named_parameters()})
            raise NonFiniteLossError(
                f"The largest gradient is {largest.item()}{wrong and f' (in {wrong})'} at {self._place}, although the "
                f"loss was finite. {_ADVICE}"
            )
        self._largest_gradient = None

    def _is_left_out(self, optimizer: Optimizer) -> bool:
        """Return whether the scaler of ``16-mixed`` skips this step, as it does until its scale fits."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return False
        # the scaler reads it in every step too
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if not found:  # a fused optimizer checks its gradients itself
            return True
        return any(each.item() > 0 for each in found.values()) and bool(scaler.get_scale() >= 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save NaN or infinite weights.

        Raises:
            NonFiniteLossError: with the first of them.
        """
        super().on_save_checkpoint(checkpoint)
        self._check_last_gradients()
        trained = {name for name, _ in self.named_parameters()}
        saved: list[Mapping[str, Any]] = [
            # other buffers, such as masks, may be infinite on purpose
            {
                name: each
                for name, each in checkpoint.get(kind, {}).items()
                if name in trained or name.endswith(_STATISTICS)
            }
            for kind in ("state_dict", "current_model_state")  # the latter next to an average
        ]
        for weights in [*saved, *map(_moments, checkpoint.get("optimizer_states", ()))]:
            wrong = _wrong_names({name: each for name, each in weights.items() if type(each) in (Tensor, nn.Parameter)})
            if wrong:
                raise NonFiniteLossError(
                    f"{wrong} became NaN or infinite by batch {self.trainer.fit_loop.batch_idx} of epoch "
                    f"{self.current_epoch}, and is not saved: earlier checkpoints are unchanged. {_ADVICE}"
                )


def _moments(optimizer: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the optimizer's state of each weight; the square of a gradient overflows before the weight does."""
    return {
        f"{name} of the optimizer for parameter {parameter}": each
        for parameter, state in optimizer.get("state", {}).items()
        for name, each in state.items()
        if isinstance(each, Tensor) and each.is_floating_point() and each.numel() > 1
    }


def _wrong_names(tensors: Mapping[str, Tensor | None]) -> str:
    """Return the names of tensors that are not finite, for a message; "" if all are."""
    given = {name: each for name, each in tensors.items() if each is not None and each.numel() > 0}
    if not given or torch.isfinite(_largest(given.values())):  # a single device sync for all
        return ""
    wrong = [name for name, each in given.items() if not torch.isfinite(each).all()]
    return f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    # the only norm that cannot overflow
    return get_total_norm(list(tensors), norm_type=torch.inf)
