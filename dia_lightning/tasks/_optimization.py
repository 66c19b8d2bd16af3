"""Which parameters of a task are trained, and at which learning rates."""

import math
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerTypeUnion
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import Self

from dia_lightning.attention import attention_parameters, is_attached
from dia_lightning.tasks._freezing import (
    finetuning,
    freeze_parameters,
    frozen_names,
    keep_trained,
    put_back,
    statistics_of,
    train_parameters,
)
from dia_lightning.tasks._layers import head_of
from dia_lightning.tasks._parameter_groups import GROUPING, Plan, fits, parameter_groups, plan_groups
from dia_lightning.tasks._rates import GroupRates
from dia_lightning.tasks._resume_check import RECORD, ResumedTraining, classes_in_use
from dia_lightning.tasks._schedule import NamedSchedule
from dia_lightning.tasks._schedule_options import (
    lightning_config,
    make_schedule,
    make_warmup,
    planned_curve,
    warn_of_long_warmup,
    warn_of_other_end,
)
from dia_lightning.tasks._trainer import trainer_of
from dia_lightning.tasks.options import Options
from dia_lightning.tasks.precision import check_gradients_survive


class TrainableModule(LightningModule):
    """A module with frozen parameters, an optimizer with groups, a schedule and a warm-up.

    Subclasses set ``_options`` and call :meth:`freeze_parameters` once their networks are built.
    """

    _options: Options

    def __init__(self) -> None:
        super().__init__()
        self.lr = math.nan  # learning-rate finders write here
        self._lr_in_use = math.nan
        self._rates: GroupRates | None = None
        self._frozen: set[str] = set()
        self._still: list[str] = []  # norms whose statistics are frozen
        self._statistics: dict[str, Tensor] = {}  # theirs, during training
        self._group_plan: Plan = {}
        self._trained: set[str] = set()
        self._unfrozen: list[nn.Parameter] = []  # since DistributedDataParallel collected its parameters
        self._monitored: float | None = None  # the last value seen by ReduceLROnPlateau
        self._plateau_epoch = -1
        self._has_validated = False
        self._resumed: ResumedTraining | None = None

    # ---- what is trained

    def network_body(self) -> nn.Module:
        """Return the network that attention is attached to and whose layers ``layer_decay`` counts."""
        backbone = getattr(self, "backbone", None)
        return backbone if isinstance(backbone, nn.Module) else self

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the head, which is trained when the rest is frozen."""
        return head_of(self.network_body(), self._attention())

    def _attention(self) -> set[nn.Parameter]:
        return set(attention_parameters(self)) if is_attached(self) else set()

    def freeze_parameters(self) -> None:
        """Freeze what the option ``freeze`` names."""
        if self._options.freeze is not None:
            kept = self._attention().union(self.head_parameters())
            self._frozen = frozen_names(self, self._options.freeze, kept)
            self._still = freeze_parameters(self, self._frozen)
            self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, except for frozen norms, which stay in evaluation mode."""
        super().train(mode)
        for path in self._still:
            self.get_submodule(path).eval()
        return self

    def setup(self, stage: str) -> None:
        """Unfreeze what a finetuning callback must not freeze, and freeze what ``freeze`` names."""
        callbacks = finetuning(self.trainer) if stage == "fit" else []
        if callbacks:
            keep_trained(self, callbacks, self._attention().union(self.head_parameters()))
        if stage == "fit":
            self._group_plan = self._plan_groups()  # before a strategy shards parameters
        self.freeze_parameters()
        self._statistics = {}

    # ---- optimizer and schedule

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, for Lightning."""
        options = self._options
        optimizer = self._new_optimizer()
        check_gradients_survive(self.trainer, optimizer)
        full = float(optimizer.param_groups[0]["lr"])
        schedule, interval = make_schedule(options, self.trainer, optimizer)
        warmup, warmup_interval = make_warmup(options, optimizer)
        self._rates = GroupRates(optimizer, schedule, warmup, full)
        self._trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self._unfrozen = []
        configs = [lightning_config(options, schedule, interval)]
        if warmup is not None:
            configs.append({"scheduler": warmup, "interval": warmup_interval})
        return [optimizer], configs

    def _new_optimizer(self) -> Optimizer:
        options = self._options
        if options.attention_lr != 1 and not self._attention():
            rank_zero_info("attention is None: the network is plain, and attention_lr is unused.")
        if not fits(self._group_plan, self):
            self._group_plan = self._plan_groups()
        groups = parameter_groups(self, self._group_plan)
        optimizer = options.make_optimizer(groups if "name" in groups[0] else groups[0]["params"])
        if self.lr != options.lr:  # a finder has changed it
            found = self.lr / float(optimizer.param_groups[0]["lr"])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * found
        self._lr_in_use = self.lr
        return optimizer

    def _plan_groups(self) -> Plan:
        options = self._options
        return plan_groups(
            self,
            self.network_body(),
            self._attention(),
            attention_lr=float(options.attention_lr),
            layer_decay=float(options.layer_decay),
            norm_weight_decay=options.norm_weight_decay,
        )

    # ---- hooks

    def on_fit_start(self) -> None:
        """Use the learning rate found by a finder, and train what a resumed finetuning callback trained.

        Raises:
            ValueError: if a checkpoint has another optimizer or schedule.
        """
        if finetuning(self.trainer):
            groups = self.trainer.optimizers[0].param_groups
            train_parameters(self, {parameter for group in groups for parameter in group["params"]})
        if self._resumed is not None:
            resumed, self._resumed = self._resumed, None
            resumed.check(self.trainer)
        self._take_found_rate()

    def on_train_start(self) -> None:
        """Warn if a resumed schedule differs from the one in the options."""
        rates, self._resumed = self._rates, None
        if rates is None or not any(rates.has(config.scheduler) for config in self.trainer.lr_scheduler_configs):
            return  # a finder at work
        is_resumed = self.trainer.global_step > 0
        if isinstance(rates.schedule, NamedSchedule):
            self._plan_again(rates, rates.schedule, is_resumed=is_resumed)
            self.trainer.lr_scheduler_configs[0].interval = rates.schedule.curve.unit
            if is_resumed:
                warn_of_other_end(rates.schedule.curve, rates.schedule.planned)
        if is_resumed and not math.isclose(rates.full, rates.planned):
            rank_zero_warn(
                f"lr is {rates.planned:.4g}, but the rate of the checkpoint, {rates.full:.4g}, is used: resuming "
                "restores the optimizer and the schedule. For a different rate, start from the weights alone: "
                "init_from instead of ckpt_path."
            )
        warn_of_long_warmup(self.trainer, self._options)
        self._note_unfrozen()  # those of a resumed callback

    def _plan_again(self, rates: GroupRates, schedule: NamedSchedule, *, is_resumed: bool) -> None:
        """Recount the training steps, since ``BatchSizeFinder`` has changed their number per epoch."""
        curve = planned_curve(self._options, schedule.planned.name, self.trainer)
        if curve != schedule.planned and not is_resumed:
            schedule.follow(curve)
            rates.start_from(rates.full)
        schedule.planned = curve

    def on_train_epoch_start(self) -> None:
        """Keep frozen parameters frozen, whatever callbacks do, and warn of parameters that no optimizer trains."""
        self._take_found_rate()
        if self._frozen:
            freeze_parameters(self, self._frozen)
            self.train(self.training)
            self._statistics = self._statistics or statistics_of(self, self._still)
            put_back(self, self._statistics)
        if self._rates is not None:
            self._rates.follow([config.scheduler for config in self.trainer.lr_scheduler_configs])
        self._note_unfrozen()

    def _note_unfrozen(self) -> None:
        if self._rates is None:
            return
        new = {name: each for name, each in self.named_parameters() if each.requires_grad and name not in self._trained}
        self._trained.update(new)
        self._unfrozen += new.values()
        known = {parameter for group in self.trainer.optimizers[0].param_groups for parameter in group["params"]}
        missing = [name for name, parameter in new.items() if parameter not in known]
        if missing:
            rank_zero_warn(
                f"{len(missing)} parameters were unfrozen but are in no optimizer group, so they do not change: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Add them with "
                "optimizer.add_param_group."
            )

    def on_after_backward(self) -> None:
        """Average gradients that ``DistributedDataParallel`` skips because they were frozen at its start."""
        strategy = self.trainer.strategy
        for parameter in self._unfrozen if isinstance(strategy, DDPStrategy) else ():
            if parameter.grad is not None:
                parameter.grad.copy_(strategy.reduce(parameter.grad, reduce_op="mean"))

    def _take_found_rate(self) -> None:
        if self._rates is not None and self.lr != self._lr_in_use:
            self._lr_in_use = self.lr
            self._rates.start_from(self.lr)

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any) -> None:
        """Step a schedule, hiding the factors of groups and warm-up."""
        rates, options = self._rates, self._options
        if rates is not None and type(scheduler).__module__.endswith("tuner.lr_finder"):
            rates.step_finder(scheduler)
        elif rates is None or not rates.has(scheduler):  # a callback may bring one, like StochasticWeightAveraging
            super().lr_scheduler_step(scheduler, metric)
        elif isinstance(scheduler, ReduceLROnPlateau):
            if options.schedule_interval == "step" or self._plateau_epoch != self.current_epoch:
                rates.step(scheduler, metric)
        elif scheduler is rates.warmup or options.schedule_interval == "epoch" or self._is_due:
            rates.step(scheduler)

    @property
    def _is_due(self) -> bool:
        return self.trainer.global_step % self._options.schedule_frequency == 0

    def on_validation_end(self) -> None:
        """Note that validation metrics are available."""
        self._has_validated = not self.trainer.sanity_checking

    def on_train_epoch_end(self) -> None:
        """Step ``ReduceLROnPlateau`` before checkpoints are written; Lightning would do so afterwards.

        Raises:
            ValueError: if the metric it watches is not logged.
        """
        rates, options = self._rates, self._options
        plateau = None if rates is None else rates.schedule
        is_due = (self.current_epoch + 1) % options.schedule_frequency == 0 and self.trainer.is_last_batch
        in_use = any(config.scheduler is plateau for config in self.trainer.lr_scheduler_configs)
        if not (isinstance(plateau, ReduceLROnPlateau) and options.schedule_interval == "epoch" and is_due and in_use):
            return
        monitor: str = plateau.monitor  # type: ignore[attr-defined]
        value = self.trainer.callback_metrics.get(monitor, self._monitored)
        if value is None:
            if self.trainer.enable_validation and not self._has_validated:
                return  # it may be a validation metric
            known = ", ".join(sorted(self.trainer.callback_metrics)) or "none"
            raise ValueError(f"ReduceLROnPlateau watches {monitor!r}, which is not logged. Logged: {known}.")
        self._monitored = float(value)
        self._plateau_epoch = self.current_epoch
        assert rates is not None
        rates.step(plateau, self._monitored)

    # ---- checkpoints and copies

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the optimizer from copies."""
        return {**super().__getstate__(), "_rates": None, "_unfrozen": [], "_statistics": {}, "_resumed": None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the classes of the optimizer and the schedule, and the last value ``ReduceLROnPlateau`` has seen."""
        if trainer_of(self) is not None and "optimizer_states" in checkpoint:
            checkpoint[RECORD] = classes_in_use(self.trainer)
        if self._monitored is not None:
            checkpoint["dia_monitored"] = self._monitored

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with parameter groups that differ from the checkpoint's.

        Raises:
            ValueError: if the options that define the groups differ.
        """
        self._monitored = checkpoint.get("dia_monitored")
        if self._monitored is not None:
            self._plateau_epoch = checkpoint["epoch"]  # Lightning's own step at its end is skipped again
        trainer = trainer_of(self)
        if trainer is None or not trainer.training or "optimizer_states" not in checkpoint:
            return
        trained = checkpoint.get("hyper_parameters", {})
        for name, default in GROUPING.items():
            before, now = trained.get(name, default), self.hparams.get(name, default)
            if before != now:
                raise ValueError(
                    f"The checkpoint was trained with {name}={before!r}, but the task has {now!r}: the state of the "
                    "optimizer does not match. Use the same, or start anew from the weights with init_from."
                )
        classes = checkpoint.get(RECORD)
        self._resumed = ResumedTraining(
            str(trainer.ckpt_path or "The checkpoint"),
            checkpoint["optimizer_states"],
            checkpoint.get("lr_schedulers", []),
            classes if isinstance(classes, dict) else {},
        )
